"""MindSpore .ckpt files: a plain concatenation of protobuf messages, one tensor (or slice of one)
in each.

Source: mindspore/ccsrc/utils/checkpoint.proto and mindspore/train/serialization.py of MindSpore
2.7.1 and 2.10.0:

    Checkpoint{repeated Value value = 1}
    Value{string tag = 1; oneof{TensorProto tensor = 2; MapTensorProto maptensor = 3}}
    TensorProto{repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3}

so a record is `0A <n> 0A <n> tag 12 <n> (08 <dim>)* 12 <n> type 1A <n> content`, every <n> and
<dim> a varint. A tensor of more than 512 MiB is cut into slices: adjacent records with the same tag
and the full dims. A scalar has no dims."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from parammap.errors import RefusedError
from parammap.formats import regular_file
from parammap.formats.format import FlatFormat
from parammap.formats.frames import FrameBuilder, Segment
from parammap.tensors.logical import Extent, Stored, TensorSpec, shape_of

_TYPE_OF = {
    "float64": "Float64",
    "float32": "Float32",
    "float16": "Float16",
    "bfloat16": "BFloat16",
    "int64": "Int64",
    "int32": "Int32",
    "int16": "Int16",
    "int8": "Int8",
    "uint64": "UInt64",
    "uint32": "UInt32",
    "uint16": "UInt16",
    "uint8": "UInt8",
    "bool": "Bool",
}
_DTYPE_OF = {ms_type: dtype for dtype, ms_type in _TYPE_OF.items()}
_STRING = "str"
#: of a text entry; those of MindSpore are names of versions and modes
_MAX_STRING_NBYTES = 1 << 20
_SLICE_NBYTES = 512 * 1024 * 1024
_ENCRYPTED = tuple(bytes([first]) + b"\x5e\x3a\x7f" for first in (0xD8, 0xD9, 0xDA))
_CRC_TAG = b"crc_num"
_CRC_NBYTES = 10
#: bytes read per record header; the second try is for a record with a very long name
_WINDOWS = (512, 1 << 20)
_VALUE, _TAG, _TENSOR, _DIM, _TYPE, _CONTENT = b"\x0a", b"\x0a", b"\x12", b"\x08", b"\x12", b"\x1a"


def frame(tensors: Sequence[TensorSpec], crc: bool = False) -> list[Segment]:
    """The segments of a .ckpt that holds `tensors` in their order, byte for byte as
    `save_checkpoint` writes them.

    `crc` appends the checksum trailer that `save_checkpoint(…, crc_check=True)` writes. Raises
    RefusedError for a name that occurs twice (the loader joins or overwrites them in silence) and
    for an empty tensor (`save_checkpoint` drops those in silence)."""
    _check_writable(tensors)
    builder = FrameBuilder()
    for index, spec in enumerate(tensors):
        for start in range(0, spec.nbytes, _SLICE_NBYTES):
            nbytes = min(_SLICE_NBYTES, spec.nbytes - start)
            builder.literal(_record_header(spec, nbytes))
            builder.content(index, spec, start, nbytes)
    if crc:
        end = builder.position
        builder.literal(_CRC_TAG)
        builder.crc(0, end, _CRC_NBYTES, "big")
    return builder.segments()


def read(path: str | os.PathLike[str]) -> dict[str, Stored | str]:
    """Where each tensor's bytes lie, in file order; a string entry is given as the string it holds.

    A tensor of several slices has as many extents. Reads record headers only, so neither the crc
    trailer's value nor a loss of whole records at the end of the file can be noticed here. Raises
    RefusedError if the file is missing, truncated, encrypted, not a .ckpt, or holds what cannot be
    converted."""
    file = os.fspath(path)
    entries: dict[str, Stored | str] = {}
    last = None
    with regular_file.opened(file) as stream:
        for record in _records(file, stream.fileno()):
            entry = _entry(file, stream.fileno(), record)
            if record.name in entries:
                entry = _joined(
                    file, record, entries[record.name], entry, adjacent=record.name == last
                )
            entries[record.name] = entry
            last = record.name
    _check_complete(file, entries)
    return entries


@dataclass(frozen=True, slots=True)
class _Record:
    """One record: a tensor's name, dims and MindSpore type, and where in the file its content
    lies."""

    name: str
    dims: tuple[int, ...]
    ms_type: str
    start: int
    nbytes: int


class _Short(Exception):
    """A record's header goes on beyond the bytes at hand."""


class _Malformed(Exception):
    """The bytes are not a record."""


class _Cursor:
    """Reads protobuf pieces from a few bytes of the file, one after another."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
        raise _Malformed

    def take(self, nbytes: int) -> bytes:
        end = self.position + nbytes
        if end > len(self.data):
            raise _Short
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def enter(self, key: bytes) -> int:
        """The length of the field `key`, which must come next."""
        if self.take(1) != key:
            raise _Malformed
        return self.varint()

    def next_is(self, key: bytes) -> bool:
        return self.data[self.position : self.position + 1] == key


def _records(file: str, fd: int) -> Iterator[_Record]:
    size = os.fstat(fd).st_size
    position = 0
    while position < size:
        head = os.pread(fd, _WINDOWS[0], position)
        if (
            position
            and size - position == len(_CRC_TAG) + _CRC_NBYTES
            and head.startswith(_CRC_TAG)
        ):
            return
        record = _record_at(file, fd, position, size)
        yield record
        position = record.start + record.nbytes


def _record_at(file: str, fd: int, position: int, size: int) -> _Record:
    for window in _WINDOWS:
        try:
            record = _parsed(os.pread(fd, window, position), position)
        except _Short:
            continue
        except (_Malformed, UnicodeDecodeError) as error:
            raise RefusedError(_foreign(file, fd, position)) from error
        if record.start + record.nbytes <= size:
            return record
        break
    raise RefusedError(
        f"{file}: ends inside a record that begins at byte {position}; it is truncated: copy it "
        f"again"
    )


def _parsed(data: bytes, position: int) -> _Record:
    cursor = _Cursor(data)
    value_end = cursor.enter(_VALUE) + cursor.position
    name = cursor.take(cursor.enter(_TAG)).decode()
    tensor_end = cursor.enter(_TENSOR) + cursor.position
    dims = []
    while cursor.next_is(_DIM):
        dims.append(cursor.enter(_DIM))
    ms_type = cursor.take(cursor.enter(_TYPE)).decode()
    nbytes = cursor.enter(_CONTENT)
    if not cursor.position + nbytes == tensor_end == value_end:
        raise _Malformed
    try:
        shape = shape_of(dims)
    except ValueError as error:
        raise _Malformed from error
    return _Record(name, shape, ms_type, position + cursor.position, nbytes)


def _foreign(file: str, fd: int, position: int) -> str:
    if os.pread(fd, 4, 0) in _ENCRYPTED:
        return f"{file}: is encrypted; load it with its key and save it without one"
    return (
        f"{file}: byte {position} begins no tensor record of a MindSpore checkpoint; the file is "
        f"of another kind,"
        " damaged, or holds map tensors, which cannot be converted"
    )


def _entry(file: str, fd: int, record: _Record) -> Stored | str:
    if record.ms_type == _STRING:
        if record.nbytes > _MAX_STRING_NBYTES:
            raise RefusedError(
                f"{file}: the text {record.name!r:.80} has {record.nbytes} bytes; the file is damaged"
            )
        return _string(file, record, os.pread(fd, record.nbytes, record.start))
    if record.ms_type not in _DTYPE_OF:
        raise RefusedError(
            f"{file}: {record.name!r} is of type {record.ms_type!r}; only {', '.join(_DTYPE_OF)}"
            " can be converted"
        )
    shape = () if record.dims == (0,) else record.dims
    return Stored(_DTYPE_OF[record.ms_type], shape, (Extent(file, record.start, record.nbytes),))


def _string(file: str, record: _Record, content: bytes) -> str:
    """Numpy's form of a string: UTF-32, filled up with NULs."""
    try:
        return content.decode("utf-32-le").rstrip("\0")
    except UnicodeDecodeError as error:
        raise RefusedError(
            f"{file}: {record.name!r} is not a valid string; the file is damaged"
        ) from error


def _joined(
    file: str, record: _Record, before: Stored | str, slice_: Stored | str, adjacent: bool
) -> Stored:
    """A tensor with one more of its slices."""
    if not (
        adjacent
        and isinstance(before, Stored)
        and isinstance(slice_, Stored)
        and (before.dtype, before.shape) == (slice_.dtype, slice_.shape)
    ):
        raise RefusedError(f"{file}: {record.name!r} occurs twice; the file is damaged")
    return replace(before, extents=before.extents + slice_.extents)


def _check_complete(file: str, entries: dict[str, Stored | str]) -> None:
    if not entries:
        raise RefusedError(f"{file}: is empty; copy it again from its source")
    for name, entry in entries.items():
        if isinstance(entry, str):
            continue
        nbytes = sum(extent.nbytes for extent in entry.extents)
        if nbytes != entry.nbytes:
            raise RefusedError(
                f"{file}: {name!r} has {nbytes} bytes, its shape {entry.shape} needs "
                f"{entry.nbytes};"
                " the file is truncated or damaged"
            )


def _check_writable(tensors: Sequence[TensorSpec]) -> None:
    names = set()
    for spec in tensors:
        if spec.name in names:
            raise RefusedError(
                f"MindSpore checkpoint: the name {spec.name!r} is used twice; rename the tensor"
            )
        if not spec.nbytes:
            raise RefusedError(
                f"MindSpore checkpoint: {spec.name!r} is empty, which the format cannot hold; drop "
                f"it"
            )
        names.add(spec.name)


def _record_header(spec: TensorSpec, nbytes: int) -> bytes:
    tensor = b"".join(_DIM + _varint(dim) for dim in spec.shape) + _field(
        _TYPE, _TYPE_OF[spec.dtype].encode()
    )
    tensor += _CONTENT + _varint(nbytes)
    value = _field(_TAG, spec.name.encode()) + _TENSOR + _varint(len(tensor) + nbytes) + tensor
    return _VALUE + _varint(len(value) + nbytes) + value


def _field(key: bytes, payload: bytes) -> bytes:
    return key + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    """Protobuf's base-128 form of a number >= 0, low bits first."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


FORMAT = FlatFormat(
    name="ckpt",
    suffixes=(".ckpt",),
    entries=read,
    structure=lambda path, offset: "a record's header: name, dims and type",
    frame=frame,
)
