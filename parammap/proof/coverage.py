"""Which bytes of a checkpoint's files fit which checksums, whatever they hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from parammap.checkpoint.manifest import MANIFEST, Manifest
from parammap.errors import RefusedError
from parammap.execute.source_checksums import check, crc32_of
from parammap.formats.zip_records import is_archive
from parammap.proof.stream import in_processes


@dataclass(slots=True)
class Coverage:
    """Bytes of files that are as the manifest says, of records of archives that fit their own
    checksums, and of all that has none. `other` are the files that the manifest says otherwise,
    `damaged` those with records that do not fit."""

    manifest: int = 0
    records: int = 0
    none: int = 0
    other: list[Path] = field(default_factory=list)
    damaged: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def nbytes(self) -> dict[str, int]:
        return {name: asdict(self)[name] for name in ("manifest", "records", "none")}

    def __str__(self) -> str:
        fitting = {"the manifest's": self.manifest, "zip records' own": self.records}
        told = ", ".join(f"{nbytes} the {whose}" for whose, nbytes in fitting.items() if nbytes)
        return (f"bytes that fit a checksum: {told or 'none'}") + (
            f"; {self.none} have none" if self.none else ""
        )


def coverage(
    folder: Path, found: tuple[Path, Manifest] | None = None, workers: int = 1
) -> Coverage:
    """Read all files of a folder (or the one that it is) and those of its manifest, and hold them to
    every checksum that there is of them."""
    expected: dict[Path, int | None] = dict.fromkeys(_files(folder))
    if found:
        root, manifest = found
        expected |= {root / path: manifest.crc32.get(path) for path in manifest.files}
    result = Coverage()
    for one in in_processes(lambda item: _cover(*item), list(_once(expected)), workers):
        result.manifest += one.manifest
        result.records += one.records
        result.none += one.none
        result.other += one.other
        result.damaged += one.damaged
    return result


def _files(folder: Path) -> Iterator[Path]:
    if folder.is_file():
        yield folder
    for inner, _, names in os.walk(folder):
        yield from (Path(inner, name) for name in sorted(names) if name != MANIFEST)


def _once(expected: dict[Path, int | None]) -> Iterator[tuple[Path, int | None]]:
    """The files, of several names of one the first that has a checksum."""
    known: dict[tuple[int, int], tuple[Path, int | None]] = {}
    for path, crc in expected.items():
        if path.is_file():
            stat = path.stat()
            before = known.setdefault((stat.st_dev, stat.st_ino), (path, crc))
            if before[1] is None is not crc:
                known[stat.st_dev, stat.st_ino] = path, crc
    yield from known.values()


def _cover(path: Path, expected: int | None) -> Coverage:
    nbytes = path.stat().st_size
    if expected is not None and crc32_of(path) == expected:
        return Coverage(manifest=nbytes)
    result = Coverage(other=[] if expected is None else [path])
    with open(path, "rb") as stream:
        if not is_archive(stream.fileno()):
            result.none = nbytes if expected is None else 0
            return result
    try:
        records = check(path)
    except RefusedError as error:
        result.damaged.append((path, f"({error})"))
        return result
    result.damaged = [(path, record.name) for record in records.damaged]
    result.records = records.nbytes
    result.none = nbytes - records.nbytes - sum(record.nbytes for record in records.damaged)
    return result
