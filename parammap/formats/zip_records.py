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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parammap.errors import RefusedError
from parammap.formats import regular_file
from parammap.formats.crc32 import crc32
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
#: what is read of a local header at first: it, a name, and torch's padding of up to 67 bytes
_HEAD_NBYTES = 256
#: of the extra field: what it is, its length
_FIELD = struct.Struct("<2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _DESCRIPTOR_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
_CENTRAL_CRC = 16
_ZIP64_END = struct.Struct("<4sQ2H2I4Q")
_ZIP64_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")


@dataclass(frozen=True, slots=True)
class StoredRecord(Extent):
    """Where a record's content lies, and its CRC-32; None for one that was saved without."""

    name: str
    crc32: int | None

    @property
    def damage(self) -> str:
        """What to say of content that does not fit the checksum."""
        return (
            f"{self.file}: the content of its record {self.name} does not fit the record's "
            "checksum; the file is damaged, copy it again from its source"
        )


_opened: ContextVar[dict[str, os.stat_result] | None] = ContextVar("_opened", default=None)


def read(path: str | os.PathLike[str], within: Extent | None = None) -> dict[str, StoredRecord]:
    """Where each record's content lies; reads the central directory and the local headers only.

    `within` is the part of the file that is the archive, if not all of it. Raises RefusedError if
    the file is missing, truncated, not a zip, a record is compressed, encrypted or doubled, or its
    two headers differ."""
    file = os.fspath(path)
    with regular_file.opened(file) as stream:
        fd = stream.fileno()
        stat = os.fstat(fd)
        if (opened := _opened.get()) is not None:
            opened.setdefault(file, stat)
        window = _Window(fd, within or Extent(file, 0, stat.st_size))
        return _records(window, _directory(window))


@contextmanager
def noting() -> Iterator[dict[str, os.stat_result]]:
    """Note the archives that `read` opens meanwhile, as they then were."""
    opened: dict[str, os.stat_result] = {}
    token = _opened.set(opened)
    try:
        yield opened
    finally:
        _opened.reset(token)


def read_all(path: str | os.PathLike[str]) -> list[StoredRecord]:
    """The records of all archives that lie behind each other in a file, in order of their content;
    none of what lies before an archive that cannot be read. Raises RefusedError as `read` does if
    that is the last one."""
    file = os.fspath(path)
    records: list[StoredRecord] = []
    with open(file, "rb") as stream:
        fd = stream.fileno()
        end = os.fstat(fd).st_size
        while end:
            window = _Window(fd, Extent(file, 0, end))
            try:
                infos = _directory(window)
                records += _records(window, infos).values()
            except RefusedError:
                if not records:
                    raise
                break
            end = min((info.header_offset for info in infos), default=0)
    return sorted(records, key=lambda record: record.offset)


def is_archive(descriptor: int) -> bool:
    """Whether an open file begins as an archive does."""
    return os.pread(descriptor, len(_LOCAL_MAGIC), 0) == _LOCAL_MAGIC


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


def read_record(record: StoredRecord) -> bytes:
    """The whole content of one (small) record. Raises RefusedError if it does not fit its
    checksum."""
    with regular_file.opened(record.file) as stream:
        content = os.pread(stream.fileno(), record.nbytes, record.offset)
    if record.crc32 not in (None, crc32(content)):
        raise RefusedError(record.damage)
    return content


def _directory(window: _Window) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(window) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
        raise RefusedError(f"{window.extent.file}: {_what_it_is(window)}") from error


def _records(window: _Window, infos: list[zipfile.ZipInfo]) -> dict[str, StoredRecord]:
    # torch.serialization.set_crc32_options(False) leaves all of them 0
    with_crc = any(info.CRC for info in infos)
    records: dict[str, StoredRecord] = {}
    for info in infos:
        if info.filename in records:
            raise RefusedError(
                f"{window.extent.file}: holds the record {info.filename!r} twice; the file is "
                "damaged"
            )
        records[info.filename] = _extent(window, info, with_crc)
    return records


def _extent(window: _Window, info: zipfile.ZipInfo, with_crc: bool = True) -> StoredRecord:
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
    head = os.pread(window.fd, _HEAD_NBYTES, start + info.header_offset) if is_inside else b""
    if len(head) < _LOCAL.size or not head.startswith(_LOCAL_MAGIC):
        raise RefusedError(
            f"{file}: record {info.filename!r} is not where the directory says; the file is damaged"
        )
    *_, name_nbytes, extra_nbytes = _LOCAL.unpack_from(head)
    nbytes = _LOCAL.size + name_nbytes + extra_nbytes
    if nbytes > len(head):
        head = os.pread(window.fd, nbytes, start + info.header_offset)
    if not _is_header_of(info, head[:nbytes]):
        raise RefusedError(
            f"{file}: record {info.filename!r} has a header that contradicts the directory; the "
            "file is damaged"
        )
    offset = info.header_offset + nbytes
    if offset + info.file_size > window.extent.nbytes:
        raise RefusedError(
            f"{file}: record {info.filename!r} ends beyond the file, which is truncated; copy it "
            f"again"
        )
    crc = info.CRC if with_crc else None
    return StoredRecord(file, start + offset, info.file_size, info.filename, crc)


def _is_header_of(info: zipfile.ZipInfo, header: bytes) -> bool:
    """Whether a local header says what the directory does, and its extra field is whole."""
    _, _, flags, packing, _, _, crc, _, size, name_nbytes, _ = _LOCAL.unpack_from(header)
    name, extra = header[_LOCAL.size :][:name_nbytes], header[_LOCAL.size + name_nbytes :]
    while len(extra) >= _FIELD.size:
        extra = extra[_FIELD.size + _FIELD.unpack_from(extra)[1] :] if _fits(extra) else b"?"
    follow = flags & _DESCRIPTOR or size == _MAX32
    return (
        not extra
        and (flags, packing) == (info.flag_bits, info.compress_type)
        and name.decode("utf-8" if flags & _UTF8 else "cp437", "replace") == info.orig_filename
        and bool(follow or (crc, size) == (info.CRC, info.file_size))
    )


def _fits(extra: bytes) -> bool:
    return _FIELD.size + int(_FIELD.unpack_from(extra)[1]) <= len(extra)


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
        known: int = crc32(data or b"")
        return known


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
