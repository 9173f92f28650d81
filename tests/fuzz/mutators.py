"""Damage that knows the structure of what it damages: each mutator takes honest bytes and a random
source, and gives other bytes, most of which get past the first check of their format's reader."""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from parammap.errors import RefusedError
from parammap.formats import pickle_writer, pickles
from parammap.formats.pickle_writer import PersistentId
from parammap.formats.pickles import Opaque

Mutator = Callable[[bytes, random.Random], bytes]

NUMBERS = [
    0,
    1,
    -1,
    2,
    7,
    64,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**64 - 1,
]
#: what a pickle of anybody else could hold: calls that run something, and bombs
SNIPPETS = [
    b"c__builtin__\neval\n(V1+1\ntR",
    b"\x8c\x0b__builtin__\x8c\x04eval\x93",
    b"cos\nsystem\n(Vtrue\ntR",
    b"cbuiltins\ngetattr\n(cmegatron.core.enums\nModelType\nVmro\ntR",
    b"ctorch.hub\nload\n(Vx\ntR",
    b"cnumpy.testing\nrunstring\n(Vx\n}tR",
    b"cbuiltins\nrange\n(J\x00\x00\x00\x7ftR",
    b"cbuiltins\nslice\n(K\x00K\x00NtR",
    b"cargparse\nNamespace\n)\x81}(Vnum_layers\nJ\x00\x00\x00\x7fub",
    b"ccollections\nOrderedDict\n(]tR",
    b"(" * 300,
    b"]" * 300,
    b")" + b"\x85" * 300,
    b"\x8b" + struct.pack("<i", 5) + b"\xff\xff\xff\xff\x7f",
    *(bytes([op]) for op in b"N)]}0(tsuabR2\x81\x88\x89\x85\x86\x87\x8f\x91\x90"),
]


def raw(data: bytes, random: random.Random) -> bytes:
    """Bits, bytes, numbers and spans anywhere."""
    out = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        at = random.randrange(len(out) + 1)
        span = random.choice([1, 2, 4, 8, 40])
        match random.randrange(6):
            case 0 if at < len(out):
                out[at] ^= 1 << random.randrange(8)
            case 1:
                width = random.choice([1, 2, 4, 8])
                number = random.choice(NUMBERS) % (1 << 8 * width)
                out[at : at + width] = number.to_bytes(width, random.choice(["little", "big"]))
            case 2:
                del out[at : at + span]
            case 3:
                out[at:at] = out[at : at + span]
            case 4:
                out[at:at] = random.randbytes(span)
            case _ if random.random() < 0.2:
                del out[at:]
    return bytes(out)


def pickled(data: bytes, random: random.Random) -> bytes:
    """Opcodes left out, doubled, exchanged, put in, and given other arguments."""
    starts = []
    try:
        for _, _, at in pickletools.genops(data):
            starts.append(at)
    except Exception:
        return raw(data, random)
    ends = [*starts[1:], len(data)]
    ops = [data[start:end] for start, end in zip(starts, ends, strict=True)]
    for _ in range(random.choice([1, 1, 2, 5])):
        at, other = random.randrange(len(ops)), random.randrange(len(ops))
        match random.randrange(7):
            case 0:
                del ops[at : at + random.choice([1, 1, 2, 3])]
            case 1:
                ops[at:at] = ops[other : other + random.choice([1, 2, 8])]
            case 2:
                ops[at], ops[other] = ops[other], ops[at]
            case 3:
                ops[at:at] = [random.choice(SNIPPETS)]
            case 4:
                ops[at] = random.choice(
                    [b"N", b"K\x05", b"]", b"}", b")", b"\x88", _number(random)]
                )
            case 5:
                numbers = [at for at, op in enumerate(ops) if op[:1] in b"KMJ\x8aG\x88\x89"]
                if numbers:
                    ops[random.choice(numbers)] = _number(random)
            case _:
                ops[at] = raw(ops[at], random)
        if not ops:
            ops = [b"N"]
    return b"".join(ops)


def _number(random: random.Random) -> bytes:
    number = random.choice([*NUMBERS, 1.5, -0.5, float("nan"), float("inf"), True])
    if isinstance(number, bool):
        return b"\x88"
    if isinstance(number, float):
        return b"G" + struct.pack(">d", number)
    content = number.to_bytes(10, "little", signed=True)
    return b"\x8a\x0a" + content


def zipped(data: bytes, random: random.Random) -> bytes:
    """The pickle inside, with all checksums right; or the archive's own structure."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:
        return raw(data, random)
    if random.random() < 0.25:
        return _structure(data, random)
    at = next(n for n, (name, _) in enumerate(records) if name.endswith("/data.pkl"))
    match random.randrange(12):
        case 0:
            del records[random.randrange(len(records))]
        case 1:
            other = random.randrange(len(records))
            records[other] = (records[other][0], raw(records[other][1], random))
        case 2:
            other = random.randrange(len(records))
            records[at], records[other] = (
                (records[at][0], records[other][1]),
                (records[other][0], records[at][1]),
            )
        case 3 | 4 | 5:
            records[at] = (records[at][0], pickled(records[at][1], random))
        case _:
            records[at] = (records[at][0], rewritten(records[at][1], random))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", random.choice([zipfile.ZIP_STORED] * 9 + [8])) as archive:
        for name, content in records:
            archive.writestr(name, content)
    return out.getvalue()


def rewritten(data: bytes, random: random.Random) -> bytes:
    """A pickle with other values: of other types and sizes, left out, put in."""
    try:
        tree = pickles.loads(data, "honest", persistent_load=PersistentId)
        for _ in range(random.choice([1, 1, 2])):
            tree = _changed(tree, random)
        return pickle_writer.dumps(tree)
    except (RefusedError, TypeError):
        return pickled(data, random)


def _structure(data: bytes, random: random.Random) -> bytes:
    """Damage to the directory at the end, or to a local header."""
    out = bytearray(data)
    if random.random() < 0.6:
        start = data.rfind(b"PK\x01\x02", 0, max(len(data) - 200, 1))
        start = random.choice([max(start, 0), max(len(data) - 98, 0)])
        out[start:] = raw(bytes(out[start:]), random)
    else:
        headers = [at for at in range(0, len(data), 64) if data.startswith(b"PK\x03\x04", at)]
        start = random.choice(headers or [0])
        out[start : start + 60] = raw(bytes(out[start : start + 60]), random)
    return bytes(out)


VALUES: list[Any] = [None, True, "", "x", [], {}, 1.5, -0.5, 1e308, float("nan"), [[]], {"a": 1}]


def jsoned(data: bytes, random: random.Random) -> bytes:
    """Values of other types and sizes, keys left out and put in; or the text."""
    try:
        tree = json.loads(data)
    except ValueError:
        return raw(data, random)
    if random.random() < 0.15:
        return random.choice(
            [raw(data, random), b"[" * 5000, b'{"a":' * 3000, b"\xff\xfe", b"", b"1" * 5000]
        )
    for _ in range(random.choice([1, 1, 2])):
        tree = _changed(tree, random)
    return json.dumps(tree).encode()


def _changed(tree: Any, random: random.Random) -> Any:
    """The tree with another value somewhere."""
    if isinstance(tree, Opaque):
        part = random.choice(
            [name for name in ("args", "state") if getattr(tree, name)] or ["args"]
        )
        return replace(tree, **{part: _changed(getattr(tree, part), random)})
    if isinstance(tree, tuple) and random.random() < 0.9:
        return tuple(_changed(list(tree), random) or ())
    if isinstance(tree, (dict, list)) and tree and random.random() < 0.9:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = _one_of(keys, tree, random)
        copied: Any = dict(tree) if isinstance(tree, dict) else list(tree)
        if random.random() < 0.15:
            del copied[key]
        else:
            copied[key] = _changed(tree[key], random)
        return copied
    return random.choice([*VALUES, *NUMBERS, -tree if type(tree) is int else 3, [tree], str(tree)])


def _one_of(keys: list[Any], tree: Any, random: random.Random) -> Any:
    """Any key; where there are tensors among the values, more often what is none."""
    plain = [key for key in keys if not isinstance(tree[key], PersistentId)]
    return random.choice(plain or keys)


def safetensored(data: bytes, random: random.Random) -> bytes:
    """The header, with its length right or not."""
    length = int.from_bytes(data[:8], "little")
    header = jsoned(data[8 : 8 + length], random)
    claimed = len(header) if random.random() < 0.9 else random.choice(NUMBERS) % 2**64
    return claimed.to_bytes(8, "little") + header + data[8 + length :]


def protobuffed(data: bytes, random: random.Random) -> bytes:
    """The header of a record: names, dims, types, lengths; records left out, doubled, exchanged."""
    spans = list(_records(data))
    records = [data[start:end] for start, end in spans]
    if not records:
        return raw(data, random)
    at, other = random.randrange(len(records)), random.randrange(len(records))
    match random.randrange(6):
        case 0:
            del records[at]
        case 1:
            records.insert(other, records[at])
        case 2:
            records[at], records[other] = records[other], records[at]
        case _:
            head = min(len(records[at]), 90)
            records[at] = raw(records[at][:head], random) + records[at][head:]
    return b"".join(records)


def _records(data: bytes) -> Any:
    at = 0
    while at < len(data) and data[at] == 0x0A:
        length = shift = 0
        end = at + 1
        while end < len(data):
            length |= (data[end] & 0x7F) << shift
            shift, end = shift + 7, end + 1
            if data[end - 1] < 0x80:
                break
        yield at, min(end + length, len(data))
        at = end + length


def headed(data: bytes, random: random.Random) -> bytes:
    """The first 128 bytes, where the header of a .npy file is."""
    text = data[:128]
    if random.random() < 0.5:
        text = text.replace(
            random.choice([b"(", b")", b"'", b"True", b"False", b"<f", b"4", b"shape", b","]),
            random.choice([b"", b"(" * 90, b"[", b"-", b"9" * 4000, b"None", b"|O", b"1.5", b"{"]),
        )
    else:
        text = raw(text, random)
    return text + data[128:]
