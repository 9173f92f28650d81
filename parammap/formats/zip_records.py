"""The zip archives that torch.save writes: stored records, each beginning at a multiple of 64
bytes.

Source: caffe2/serialize/inline_container.cc of PyTorch 2.13 (class PyTorchStreamWriter, over miniz)
and PKWARE's APPNOTE.TXT 6.3. What `frame` writes equals torch's file byte for byte: sizes and CRC
follow the data (flag bit 3), a padding field "FB" aligns it, and the zip64 end records are always
there."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parammap.errors import RefusedError
from parammap.formats.frames import FrameBuilder, Segment
from parammap.tensors.logical import Extent, TensorSpec

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_ALIGNMENT = 64
_MAX32 = 0xFFFFFFFF
_MAX16 = 0xFFFF
#: general purpose flags: UTF-8 name; size and CRC follow the data, which torch leaves out where
#: there is none
_UTF8, _DESCRIPTOR = 0x0800, 0x0008
_ENCRYPTED = 0x1
#: of the directory of an archive: a million records take about 100 bytes each
_MAX_DIRECTORY_NBYTES = 1 << 27
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _DESCRIPTOR_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
_CENTRAL_CRC = 16
_ZIP64_END = struct.Struct("<4sQ2H2I4Q")
_ZIP64_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")


def read(path: str | os.PathLike[str], within: Extent | None = None) -> dict[str, Extent]:
    """Where each record's content lies; reads the central directory and the local headers only.

    `within` is the part of the file that is the archive, if not all of it. Raises RefusedError if
    the file is missing, truncated, not a zip, or a record is compressed, encrypted or doubled."""
    file = os.fspath(path)
    try:
        with open(file, "rb") as stream:
            fd = stream.fileno()
            return _extents(_Window(fd, within or Extent(file, 0, os.fstat(fd).st_size)))
    except OSError as error:
        raise RefusedError(f"{file}: cannot be read ({error.strerror}); check the path") from error


class _Window(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, fd: int, extent: Extent) -> None:
        self.fd, self.extent, self._position = fd, extent, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = (0, self._position, self.extent.nbytes)[whence] + offset
        if self._position < 0:
            raise ValueError("a position before the start")
        return self._position

    def read(self, nbytes: int = -1) -> bytes:
        """Up to a whole directory; raises ValueError for a larger one, which takes no memory."""
        left = max(self.extent.nbytes - self._position, 0)
        wanted = left if nbytes < 0 else min(nbytes, left)
        if wanted > _MAX_DIRECTORY_NBYTES:
            raise ValueError(f"a directory of {wanted} bytes")
        return super().read(wanted) or b""

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        nbytes = min(len(view), max(self.extent.nbytes - self._position, 0))
        data = os.pread(self.fd, nbytes, self.extent.offset + self._position) if nbytes else b""
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def read_record(extent: Extent) -> bytes:
    """The whole content of one (small) record."""
    with open(extent.file, "rb") as stream:
        return os.pread(stream.fileno(), extent.nbytes, extent.offset)


def _extents(window: _Window) -> dict[str, Extent]:
    file = window.extent.file
    try:
        with zipfile.ZipFile(window) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
        raise RefusedError(f"{file}: {_what_it_is(window)}") from error
    extents: dict[str, Extent] = {}
    for info in infos:
        if info.filename in extents:
            raise RefusedError(
                f"{file}: holds the record {info.filename!r} twice; the file is damaged"
            )
        extents[info.filename] = _extent(window, info)
    return extents


def _extent(window: _Window, info: zipfile.ZipInfo) -> Extent:
    file, start = window.extent.file, window.extent.offset
    if (
        info.compress_type != zipfile.ZIP_STORED
        or info.flag_bits & _ENCRYPTED
        or info.compress_size != info.file_size
    ):
        raise RefusedError(
            f"{file}: record {info.filename!r} is packed or encrypted; save it again with "
            f"torch.save"
        )
    is_inside = 0 <= info.header_offset < window.extent.nbytes
    header = os.pread(window.fd, _LOCAL.size, start + info.header_offset) if is_inside else b""
    if len(header) < _LOCAL.size or not header.startswith(_LOCAL_MAGIC):
        raise RefusedError(
            f"{file}: record {info.filename!r} is not where the directory says; the file is damaged"
        )
    *_, name_nbytes, extra_nbytes = _LOCAL.unpack(header)
    offset = info.header_offset + _LOCAL.size + name_nbytes + extra_nbytes
    if offset + info.file_size > window.extent.nbytes:
        raise RefusedError(
            f"{file}: record {info.filename!r} ends beyond the file, which is truncated; copy it "
            f"again"
        )
    return Extent(file, start + offset, info.file_size)


def _what_it_is(stream: io.RawIOBase) -> str:
    stream.seek(0)
    head = stream.read(512)
    if not head:
        return "is empty; copy it again from its source"
    if head.startswith(_LOCAL_MAGIC):
        return "is truncated: its zip directory is missing; copy it again from its source"
    if head.startswith(b"\x80") or head[257:262] == b"ustar":
        return "is in torch's format from before 1.6; load it and save it again with a current torch.save"
    return "is not a checkpoint of torch.save (no zip archive); check the path"


@dataclass(frozen=True, slots=True)
class Record:
    """A record to be written: a name, and a tensor (its index among those framed, and its spec) or
    plain bytes."""

    name: str
    content: bytes | tuple[int, TensorSpec]

    @property
    def nbytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content[1].nbytes


@dataclass(frozen=True, slots=True)
class _Placed:
    """A record in the file: where its local header and its content begin."""

    record: Record
    header: int
    start: int

    @property
    def crc(self) -> int | None:
        """The CRC-32 of the content, where that is known at plan time."""
        content = self.record.content
        data = content if isinstance(content, bytes) else content[1].data
        if data is None and self.record.nbytes:
            return None
        return zlib.crc32(data or b"")


def frame(records: Sequence[Record]) -> list[Segment]:
    """The segments of an archive that holds `records`, in their order."""
    builder = FrameBuilder()
    placed = [_add_record(builder, record) for record in records]
    start = builder.position
    for entry in placed:
        _add_directory_entry(builder, entry)
    builder.literal(_end_records(len(placed), start, builder.position))
    return builder.segments()


def _add_record(builder: FrameBuilder, record: Record) -> _Placed:
    name = record.name.encode()
    zip64 = _zip64_field(record.nbytes, 0, builder.position)
    extra = zip64 + _padding(builder.position + _LOCAL.size + len(name) + len(zip64))
    header = (
        _LOCAL.pack(_LOCAL_MAGIC, 0, _flags(record), 0, 0, 0, 0, 0, 0, len(name), len(extra))
        + name
        + extra
    )
    placed = _Placed(record, builder.position, builder.position + len(header))
    builder.literal(header)
    if isinstance(record.content, bytes):
        builder.literal(record.content)
    else:
        builder.content(*record.content, 0, record.nbytes)
    if record.nbytes:
        builder.literal(_DESCRIPTOR_MAGIC)
        _add_crc(builder, placed)
        builder.literal(struct.pack("<2Q" if zip64 else "<2I", record.nbytes, record.nbytes))
    return placed


def _flags(record: Record) -> int:
    return _UTF8 | _DESCRIPTOR if record.nbytes else _UTF8


def _add_directory_entry(builder: FrameBuilder, placed: _Placed) -> None:
    name, nbytes = placed.record.name.encode(), placed.record.nbytes
    zip64 = _zip64_field(nbytes, nbytes, placed.header)
    entry = _CENTRAL.pack(
        _CENTRAL_MAGIC,
        0,
        0,
        _flags(placed.record),
        0,
        0,
        0,
        0,
        min(nbytes, _MAX32),
        min(nbytes, _MAX32),
        len(name),
        len(zip64),
        0,
        0,
        0,
        0,
        min(placed.header, _MAX32),
    )
    builder.literal(entry[:_CENTRAL_CRC])
    _add_crc(builder, placed)
    builder.literal(entry[_CENTRAL_CRC + 4 :] + name + zip64)


def _add_crc(builder: FrameBuilder, placed: _Placed) -> None:
    if placed.crc is None:
        builder.crc(placed.start, placed.start + placed.record.nbytes, 4, "little")
    else:
        builder.literal(struct.pack("<I", placed.crc))


def _zip64_field(nbytes: int, packed_nbytes: int, header: int) -> bytes:
    """The extra field for what 32 bits cannot hold: the sizes, the header's offset; empty if they
    can hold all.

    The packed size is known to the directory only: in a local header torch leaves it zero, like all
    other sizes."""
    values = [nbytes, packed_nbytes] * (nbytes >= _MAX32) + [header] * (header >= _MAX32)
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _padding(position: int) -> bytes:
    """The extra field that makes what follows it begin at a multiple of the alignment."""
    nbytes = -(position + 4) % _ALIGNMENT
    return b"FB" + struct.pack("<H", nbytes) + b"Z" * nbytes


def _end_records(count: int, start: int, end: int) -> bytes:
    few, nbytes = min(count, _MAX16), end - start
    return (
        _ZIP64_END.pack(
            b"PK\x06\x06", _ZIP64_END.size - 12, 0x031E, 45, 0, 0, count, count, nbytes, start
        )
        + _ZIP64_LOCATOR.pack(b"PK\x06\x07", 0, end, 1)
        + _END.pack(b"PK\x05\x06", 0, 0, few, few, min(nbytes, _MAX32), min(start, _MAX32), 0)
    )
