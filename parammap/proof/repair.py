"""Repairing an output: the bytes of its wrong tensors are written again from the source, and no
others."""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from parammap.checkpoint import manifest as manifests
from parammap.checkpoint.index import Index
from parammap.errors import RefusedError
from parammap.execute.durable import sync
from parammap.execute.gather import Files, array_of
from parammap.formats import zip_records
from parammap.formats.crc32 import crc32
from parammap.formats.zip_records import StoredRecord
from parammap.proof.compare import Pair, read_both
from parammap.proof.stream import BAND_BYTES, Copy, copies_of
from parammap.proof.verify import Verdict, Verification, read_output, read_source, verify
from parammap.tensors.arrays import Array
from parammap.tensors.logical import Extent
from parammap.tensors.region import Region

#: general purpose bit 3: the CRC follows the content
_DESCRIPTOR = 0x0008


def repair(request: Verification, verdict: Verdict, into: Path | None) -> Verdict:
    """Repair what `verdict` found wrong: in a copy that is to be `into`, or in place (None).
    Returns the new verdict.

    Raises RefusedError if `into` exists; a copy appears whole and verified, or, if it still is
    wrong, not at all."""
    if into is None:
        return _repaired(request, verdict)
    if into.exists():
        raise RefusedError(f"{into}: exists; choose another folder for the repaired copy")
    if not request.output.exists():
        raise RefusedError(
            f"{request.output}: names no folder and no file of which to make a copy; repair it "
            f"--in-place"
        )
    staged = into.parent / f".{into.name}.parammap"
    if staged.exists() or into.resolve().is_relative_to(request.output.resolve()):
        raise RefusedError(
            f"{staged if staged.exists() else into}: is in the way; choose another folder for the "
            f"copy"
        )
    try:
        copy = _copy(request.output, staged)
        after = _repaired(replace(request, output=copy), verdict)
        if not after.problems:
            os.rename(copy, into)
        return after
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _copy(source: Path, target: Path) -> Path:
    """A copy of a folder in which files that were one by hard links still are; of a file, a copy in
    folder `target`."""
    if source.is_file():
        target.mkdir(parents=True)
        return Path(shutil.copy2(source, target / source.name))
    names: dict[int, Path] = {}
    for folder, _, files in os.walk(source):
        there = target / Path(folder).relative_to(source)
        there.mkdir(parents=True, exist_ok=True)
        for name in files:
            inode = os.stat(Path(folder) / name).st_ino
            if inode in names:
                os.link(names[inode], there / name)
            else:
                names[inode] = there / name
                shutil.copy2(Path(folder) / name, there / name)
    return target


def _repaired(request: Verification, verdict: Verdict) -> Verdict:
    """Write the wrong tensors of `request.output` anew and verify it again, its archives' checksums
    too."""
    _, manifest = manifests.find(request.output) or (None, None)
    checksums = _Checksums()
    output, source = read_output(request, manifest), read_source(request, manifest)
    for pair, found in verdict.wrong:
        if found.apart is None:
            _rewrite(pair, output.index, source.index, checksums)
    checksums.renew()
    for file in checksums.files:
        sync(file)
    return verify(request)


def _rewrite(pair: Pair, output: Index, source: Index, checksums: _Checksums) -> None:
    """Write the bands of every copy of a tensor that are not as the source has them."""
    regions = output.shards[pair.a], source.shards[pair.b]
    with Files() as files:
        for number in range(max(map(copies_of, regions))):
            there, right = Copy(pair.a, regions[0], number), Copy(pair.b, regions[1], number)
            for band, wrong_bits, bits in read_both(pair, there, right, files):
                if not np.array_equal(wrong_bits, bits):
                    _write_band(there, band, bits, checksums)


def _write_band(copy: Copy, band: Region, bits: Array, checksums: _Checksums) -> None:
    content = bits.data.cast("B")
    for view, there in copy.parts(band):
        for run in view.runs():
            part = view.narrow(run)
            checksums.before_write(part.file, part.offset)
            _write_at(
                part.file, part.offset, np.ascontiguousarray(array_of(content, there.narrow(run)))
            )


def _write_at(file: str, offset: int, content: Array) -> None:
    data = content.reshape(-1).view(np.uint8).data
    try:
        descriptor = os.open(file, os.O_WRONLY)
        try:
            while data:
                count = os.pwrite(descriptor, data, offset)
                data, offset = data[count:], offset + count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RefusedError(
            f"{file}: cannot be written ({error.strerror}); repair into a copy, with --into"
        ) from error


# -----------------------------------------------------------------------------------------------------------
# checksums


class _Checksums:
    """The CRC-32 of the records of torch.save's archives that are written to.

    A record that fits its checksum, wrong values and all, was saved so: it gets the right ones'
    checksum. One that does not was damaged after it was saved: with the right values it must fit
    again, so its checksum is left as it is."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self._records: dict[str, dict[str, StoredRecord]] = {}
        self._fitted: dict[tuple[str, str], bool] = {}

    def before_write(self, file: str, offset: int) -> None:
        """To be called before a byte of a tensor that begins at `offset` is written."""
        self.files.add(file)
        if file not in self._records:
            with open(file, "rb") as stream:
                is_archive = zip_records.is_archive(stream.fileno())
            self._records[file] = zip_records.read(file) if is_archive else {}
        if not self._records[file]:
            return
        name = next(
            name
            for name, extent in self._records[file].items()
            if extent.offset <= offset < extent.offset + extent.nbytes
        )
        if (file, name) not in self._fitted:
            with zipfile.ZipFile(file) as archive:
                self._fitted[file, name] = (
                    _crc(self._records[file][name]) == archive.getinfo(name).CRC
                )

    def renew(self) -> None:
        for (file, name), fitted in self._fitted.items():
            if fitted:
                extent = self._records[file][name]
                content = np.frombuffer(_crc(extent).to_bytes(4, "little"), np.uint8)
                for offset in _places_of_crc(extent, name):
                    _write_at(file, offset, content)


def _crc(extent: Extent) -> int:
    crc, end = 0, extent.offset + extent.nbytes
    with open(extent.file, "rb") as stream:
        for offset in range(extent.offset, end, BAND_BYTES):
            crc = crc32(os.pread(stream.fileno(), min(BAND_BYTES, end - offset), offset), crc)
    return crc


def _places_of_crc(extent: Extent, name: str) -> Iterator[int]:
    """Where an archive keeps a record's CRC-32 (APPNOTE.TXT 6.3): in the directory (4.3.12), and
    either in its local header (4.3.7) or, where general purpose bit 3 is set, behind the content
    (4.3.9)."""
    with zipfile.ZipFile(extent.file) as archive:
        info, position = archive.getinfo(name), archive.start_dir
        yield (
            extent.offset + extent.nbytes + 4
            if info.flag_bits & _DESCRIPTOR
            else info.header_offset + 14
        )
        for entry in archive.infolist():
            if entry is info:
                yield position + 16
            position += _directory_entry(extent.file, position)


def _directory_entry(file: str, position: int) -> int:
    """The length of a directory's entry: 46 bytes, the name, the extra field and the comment."""
    with open(file, "rb") as stream:
        lengths: tuple[int, ...] = struct.unpack("<3H", os.pread(stream.fileno(), 6, position + 28))
    return 46 + sum(lengths)
