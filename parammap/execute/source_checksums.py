"""The checksums that a source's own files carry (CRC-32 of zip records), checked with what is read
of them anyway.

While a file is written, each run of bytes that is read for it is summed up; in the end the runs of
a record, whichever tasks read them, are combined, and only what none of them covers is read once
more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from parammap.errors import RefusedError, TaskError
from parammap.formats import zip_records
from parammap.formats.crc32 import combine, crc32

#: bytes read at a time
_BUFFER_BYTES = 1 << 20
#: records of so many bytes at most may have been read for what they say, such as a count of steps
_SMALL_BYTES = 16 << 10
#: so many runs of a file are kept at most, of which none is shorter than this; runs that go on in
#: each other are one
_MOST_RUNS, _LONG_BYTES = 1 << 13, 64 << 10


class Run(NamedTuple):
    """Bytes [start, end) of a file that were read, and their CRC-32."""

    start: int
    end: int
    crc32: int


#: by file
Runs = dict[str, list[Run]]


class RunsRead:
    """The runs of bytes that were read of files with checksums."""

    def __init__(self) -> None:
        #: by file and the byte behind it, each run's begin and its checksum
        self._ends: dict[str, dict[int, tuple[int, int]]] = {}

    def open(self, file: str, descriptor: int) -> None:
        """Say that a file is going to be read."""
        if zip_records.is_archive(descriptor):
            self._ends.setdefault(file, {})

    def add(self, file: str, start: int, content: memoryview) -> None:
        """Take in what was read at byte `start`."""
        ends, end = self._ends.get(file), start + len(content)
        if ends is None or end in ends:
            return
        begin, crc = ends.pop(start, (start, 0))
        ends[end] = begin, crc32(content, crc)
        if len(ends) > _MOST_RUNS:
            self._ends[file] = {run.end: (run.start, run.crc32) for run in _joined(ends)}

    def taken(self) -> Runs:
        """All of them, in order."""
        return {file: list(_joined(ends)) for file, ends in self._ends.items() if ends}


def _joined(ends: dict[int, tuple[int, int]]) -> Iterator[Run]:
    """The runs in order, those that go on in each other made one; only long ones if they are
    many."""
    joined: list[Run] = []
    for run in sorted(Run(start, end, crc) for end, (start, crc) in ends.items()):
        if joined and joined[-1].end == run.start:
            before = joined.pop()
            run = Run(before.start, run.end, combine(before.crc32, run.crc32, run.end - run.start))
        joined.append(run)
    many = len(joined) > _MOST_RUNS // 2
    return (run for run in joined if not many or run.end - run.start >= _LONG_BYTES)


@dataclass(frozen=True, slots=True)
class Covered:
    """Bytes and records that fit their checksums, and the names of the records that do not."""

    nbytes: int
    records: int
    damaged: tuple[zip_records.StoredRecord, ...] = ()


def check(file: str | Path, runs: list[Run] | None = None) -> Covered:
    """Hold the records of a file's archives to their checksums: small ones, and those of which a run
    was read; all if `runs` is None. Reads what the runs do not cover. Records without a checksum are
    left out.

    Raises RefusedError for a file that cannot be read, or is no archive any more."""
    records = [one for one in zip_records.read_all(file) if one.crc32 is not None]
    nbytes = count = 0
    damaged, left = [], sorted(runs or [], key=lambda run: (run.start, -run.end), reverse=True)
    try:
        with open(file, "rb") as stream:
            for record in records:
                inside = list(_inside(left, record.offset, record.offset + record.nbytes))
                if not (inside or runs is None or record.nbytes <= _SMALL_BYTES):
                    continue
                if _crc32(stream.fileno(), record, inside) != record.crc32:
                    damaged.append(record)
                    continue
                nbytes, count = nbytes + record.nbytes, count + 1
    except OSError as error:
        raise RefusedError(f"{file}: cannot be read ({error.strerror}); check the path") from error
    return Covered(nbytes, count, tuple(damaged))


def crc32_of(file: str | Path) -> int:
    """Of a whole file. Raises OSError."""
    with open(file, "rb") as stream:
        descriptor = stream.fileno()
        return _crc32_read(descriptor, 0, os.fstat(descriptor).st_size, 0)


def _inside(left: list[Run], start: int, end: int) -> Iterator[Run]:
    """The next runs (the first one last) that lie in [start, end), without those that overlap."""
    while left and left[-1].start < end:
        run = left.pop()
        if run.start >= start and run.end <= end:
            yield run
            start = run.end


def _crc32(descriptor: int, record: zip_records.StoredRecord, runs: list[Run]) -> int:
    """Of a record's content, with what is known of it."""
    crc, position = 0, record.offset
    for run in runs:
        crc = _crc32_read(descriptor, position, run.start, crc)
        crc, position = combine(crc, run.crc32, run.end - run.start), run.end
    return _crc32_read(descriptor, position, record.offset + record.nbytes, crc)


def _crc32_read(descriptor: int, start: int, end: int, crc: int) -> int:
    """Of bytes [start, end) of a file behind others of which it is `crc`."""
    while start < end:
        content = os.pread(descriptor, min(_BUFFER_BYTES, end - start), start)
        if not content:
            raise TaskError("a file ends before its last byte; it was cut while being read")
        crc, start = crc32(content, crc), start + len(content)
    return crc
