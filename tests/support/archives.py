"""Zip archives of which tests change bytes, by the standard library alone."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path


def content_of(path: Path, info: zipfile.ZipInfo) -> tuple[int, int]:
    """The first byte of a record's content, and the byte behind it."""
    with open(path, "rb") as stream:
        stream.seek(info.header_offset + 26)
        lengths = struct.unpack("<2H", stream.read(4))
    start = info.header_offset + 30 + sum(lengths)
    return start, start + info.file_size


def reseal(path: Path) -> None:
    """Give the records of an archive the CRC-32s of what they hold now, as if they were saved so."""
    with zipfile.ZipFile(path) as archive:
        infos, position = archive.infolist(), archive.start_dir
    data = bytearray(path.read_bytes())
    for info in infos:
        start, end = content_of(path, info)
        crc = struct.pack("<I", zlib.crc32(data[start:end]))
        follows = end + 4 if info.flag_bits & 8 and info.file_size else info.header_offset + 14
        data[follows : follows + 4] = crc
        data[position + 16 : position + 20] = crc
        position += 46 + sum(struct.unpack_from("<3H", data, position + 28))
    path.write_bytes(data)
