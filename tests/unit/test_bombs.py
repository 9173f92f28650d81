"""Small files that ask for much: refused in one line, within little memory and time."""

import functools
import io
import os
import struct
import zipfile

import numpy as np
import pytest

from parammap.checkpoint import extra_states
from parammap.formats import mindspore_ckpt, npy, pickles, safetensors, torch_dist, torch_legacy
from parammap.formats.pickle_writer import PersistentId, dumps
from parammap.formats.pickles import Global, Opaque, Size
from tests.support.bounded import refusal_of

MANY = 2_000_000
RANGE = b"cbuiltins\nrange\n(J\x00\xa3\xe1\x11tR"


def _doubled(empty: bytes, pair: bytes, times: int) -> bytes:
    """A container that holds another one twice, which holds a third one twice, and so on."""
    links = (pair.replace(b"?", bytes([n])) + b"q" + bytes([n + 1]) for n in range(times))
    return empty + b"q\x00" + b"".join(links)


PICKLES = {
    "nested tuples": b")" + b"\x85" * MANY,
    "nested tuples as a key": b"})" + b"\x85" * MANY + b"Ns",
    "nested tuples in a set": b"\x8f()" + b"\x85" * MANY + b"\x90",
    "nested tuples that are given up": b")" + b"\x85" * MANY + b"0N",
    "nested lists": b"]" * MANY + b"a" * (MANY - 1),
    "nested dicts": b"}" + b"N}" * MANY + b"s" * MANY,
    "nested marks": b"(" * MANY + b"N",
    "nested calls": b"cmegatron\nX\n" + b")R" * 200,
    "nested states": b"cmegatron\nX\n)R" * 200 + b"b" * 199,
    "nested frozensets": b"(\x91" + b"".join(b"q\x00(h\x00\x91" for _ in range(2000)),
    "doubled tuples": _doubled(b")", b"h?h?\x86", 60),
    "doubled tuples as a key": _doubled(b")", b"h?h?\x86", 60) + b"}h\x3cNs",
    "doubled lists": _doubled(b"]", b"](h?h?e", 60),
    "doubled states": _doubled(b"]", b"cmegatron\nX\n)R(h?h?lb", 60),
    "a list that holds itself": b"]q\x00h\x00a",
    "a dict that holds itself": b"}q\x00Nh\x00s",
    "list[slice] = range": b"](cbuiltins\nslice\n(K\x00K\x00NtR" + RANGE + b"u",
    "bytearray[slice] = range": b"cbuiltins\nbytearray\n)R(cbuiltins\nslice\n(NNNtR" + RANGE + b"u",
    "a set of a range": b"cbuiltins\nset\n" + RANGE + b"\x85R",
    "an OrderedDict of a range": b"ccollections\nOrderedDict\n" + RANGE + b"\x85R",
    "a Size of a range": b"ctorch\nSize\n" + RANGE + b"\x85R",
    "a Size of floats": b"ctorch\nSize\n(G?\xf0\x00\x00\x00\x00\x00\x00t\x85R",
    "arguments that are a range": b"ctorch\nSize\n" + RANGE + b"R",
    "a long number": b"\x8b\xff\xff\xff\x7f\x01",
    "a long number in digits": b"I" + b"9" * 5000 + b"\n",
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle(case):
    data = b"\x80\x04" + PICKLES[case] + b"."
    assert refusal_of(lambda: pickles.loads(data, "evil.pt")).startswith("evil.pt: ")


def test_what_is_nested_and_shared_as_in_real_checkpoints_is_read():
    nested = b"\x80\x04" + b"]" * 50 + b"a" * 49 + b"."
    shared = b"\x80\x04" + _doubled(b"]", b"](h?h?e", 10) + b"."
    parent = b"\x80\x04cmegatron\nX\n)\x81q\x00]q\x01h\x00ab."
    for data in (nested, shared, parent):
        assert pickles.loads(data, "f") is not None


SIX = ("storage", Global("torch", "FloatStorage"), "0", "cpu", 6)
SHAPES = {
    "negative": (-2, -3),
    "of floats": (2.0, 3.0),
    "of booleans": (True, 6),
    "of texts": ("2", "3"),
    "a text": "23",
    "a range": Opaque(Global("builtins", "range"), (0, 300_000_000)),
    "beyond 64 bits": (2**70, 0),
    "of thousands of digits": (10**5000, 0),
    "of 65 dimensions": (1,) * 65,
    "of 50,000 dimensions": [1] * 50_000,
}


def _torch(path, tree):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", dumps(tree))
        archive.writestr("a/data/0", bytes(24))


def _tensor(storage=SIX, offset=0, shape=(2, 3), stride=(3, 1)):
    kind, hooks = (
        Global("torch._utils", "_rebuild_tensor_v2"),
        Opaque(Global("collections", "OrderedDict"), ()),
    )
    return Opaque(kind, (PersistentId(storage), offset, shape, stride, False, hooks))


TENSORS = {
    **{f"shape {name}": {"shape": shape} for name, shape in SHAPES.items()},
    **{f"stride {name}": {"stride": shape} for name, shape in SHAPES.items()},
    "offset negative": {"offset": -1},
    "offset a float": {"offset": 0.0},
    "offset beyond 64 bits": {"offset": 2**64},
    "number of elements a float": {"storage": (*SIX[:4], 6.0)},
    "number of elements a text": {"storage": (*SIX[:4], "x")},
    "key a nested tuple": {"storage": (*SIX[:2], ((), ()), "cpu", 6)},
    "kind a text": {"storage": ("storage", "FloatStorage", "0", "cpu", 6)},
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_of_torch(case, tmp_path):
    path = tmp_path / "evil.pt"
    _torch(path, {"a": _tensor(**TENSORS[case])})
    assert refusal_of(lambda: torch_legacy.read_either(path)).startswith(f"{path}: ")


def test_a_tensor_of_torch_that_is_honest_is_read(tmp_path):
    _torch(tmp_path / "a.pt", _tensor())
    assert torch_legacy.read_either(tmp_path / "a.pt").shape == (2, 3)


def _claiming_zip(path):
    """An archive whose directory claims to be a terabyte."""
    _torch(path, {})
    content, huge = path.read_bytes(), 1 << 40
    end = content.rindex(b"PK\x05\x06")
    zip64 = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, huge, 0)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    last = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2, 2, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(content[:end] + zip64 + locator + last)


def _claiming_record(path):
    """An archive whose record claims to be a terabyte."""
    _torch(path, {})
    content = path.read_bytes()
    at = content.index(b"PK\x01\x02")
    path.write_bytes(
        content[: at + 20] + struct.pack("<2I", 0xFFFFFFF0, 0xFFFFFFF0) + content[at + 28 :]
    )


def _npy(header: bytes, version: bytes = b"\x01\x00", length: bytes | None = None) -> bytes:
    return b"\x93NUMPY" + version + (length or struct.pack("<H", len(header))) + header


def _safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def _record(dims: bytes, kind: bytes, nbytes: int) -> bytes:
    tensor = dims + b"\x12" + bytes([len(kind)]) + kind + b"\x1a" + mindspore_ckpt._varint(nbytes)
    value = b"\x0a\x01a\x12" + mindspore_ckpt._varint(len(tensor) + nbytes) + tensor
    return b"\x0a" + mindspore_ckpt._varint(len(value) + nbytes) + value


def _sparse(path, head: bytes, nbytes: int):
    """A file of that many bytes, of which the disk holds only the head."""
    path.write_bytes(head)
    os.truncate(path, len(head) + nbytes)


def _described(shape: str) -> bytes:
    return f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode()


def _sparse_directory(path):
    """An archive whose directory is a hole of 8 gigabytes."""
    _sparse(path, b"PK\x03\x04", 8 << 30)
    zip64 = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, 8 << 30, 4)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, (8 << 30) + 4, 1)
    last = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2, 2, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with open(path, "ab") as stream:
        stream.write(zip64 + locator + last)


FILES = {
    "zip directory of 8 gigabytes": (torch_legacy.read_either, _sparse_directory),
    "zip directory of a terabyte": (torch_legacy.read_either, _claiming_zip),
    "zip record of 4 gigabytes": (torch_legacy.read_either, _claiming_record),
    "npy header of 4 gigabytes": (npy.read, _npy(b"", b"\x02\x00", b"\xff\xff\xff\xff")),
    "npy header of 4 gigabytes in a large file": (
        npy.read,
        functools.partial(
            _sparse, head=_npy(b"", b"\x02\x00", b"\xf0\xff\xff\xff"), nbytes=1 << 32
        ),
    ),
    "npy header of nested brackets": (npy.read, _npy(b"(" * 9000)),
    "npy header of nested signs": (npy.read, _npy(b"-" * 9000 + b"1")),
    "npy shape that is negative": (npy.read, _npy(_described("(-2, -3)"))),
    "npy shape of 100 dimensions": (npy.read, _npy(_described("(1,) * 100"))),
    "safetensors header of exabytes": (safetensors.read, b"\xff" * 7 + b"\x7f{}"),
    "safetensors header of nested lists": (safetensors.read, _safetensors(b"[" * MANY)),
    "safetensors shape of a million dimensions": (
        safetensors.read,
        _safetensors(
            b'{"a":{"dtype":"F32","shape":['
            + b"99999999999," * 999_999
            + b'9],"data_offsets":[0,4]}}'
        ),
    ),
    "ckpt of many dims": (
        mindspore_ckpt.read,
        _record(b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\x7f" * 100_000, b"Int8", 2) + b"xy",
    ),
    "ckpt of a text of gigabytes": (
        mindspore_ckpt.read,
        functools.partial(_sparse, head=_record(b"\x08\x00", b"str", 3 << 30), nbytes=3 << 30),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file(case, tmp_path):
    read, content = FILES[case]
    path = tmp_path / "evil.bin"
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    assert refusal_of(lambda: read(path)).startswith(f"{path}: ")


@pytest.mark.parametrize("place", [(-1, 4), (0, -4), (0.0, 4), (2**70, 2**70)])
def test_a_place_in_a_distributed_checkpoint(place, tmp_path):
    (tmp_path / "a.distcp").write_bytes(bytes(64))
    info = {"relative_path": "a.distcp", "offset": place[0], "length": place[1]}
    index = torch_dist._index("a", Size((0,)))
    stored = torch_dist._record("_StorageInfo", info, "torch.distributed.checkpoint.filesystem")
    tree = {"state_dict_metadata": {}, "storage_data": {index: stored}}
    (tmp_path / ".metadata").write_bytes(dumps(torch_dist._record("Metadata", tree)))
    assert "not a count" in refusal_of(lambda: torch_dist.read(tmp_path))


def test_a_packed_extra_state_is_not_unpacked():
    """Transformer Engine 1 keeps what torch.save wrote; that of None is 4 bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 26))

    def read():
        state = Opaque(Global("_io", "BytesIO"), (), state=(content.getvalue(), 0, None))
        assert extra_states.holds_anything(state)
        return npy.read("missing.npy")

    assert "missing.npy" in refusal_of(read)


def test_honest_arrays_are_read(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3), "float32"))
    assert npy.read(tmp_path / "a.npy").shape == (2, 3)
