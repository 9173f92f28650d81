"""CRC-32s of pieces make that of the whole, as zlib computes it."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parammap.execute import source_checksums
from parammap.execute.source_checksums import Run, RunsRead, check
from parammap.formats.crc32 import combine, crc32
from parammap.formats.frames import write
from parammap.formats.zip_records import Record, frame, read


@given(st.binary(max_size=400), st.binary(max_size=400))
def test_two_pieces_are_combined(first, second):
    assert crc32(first) == zlib.crc32(first)
    both = zlib.crc32(first + second)
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == both
    assert combine(zlib.crc32(first), both, len(second)) == zlib.crc32(second)


def test_pieces_of_gigabytes_are_combined():
    zeros = bytes(1 << 20)
    whole = zlib.crc32(b"x")
    for _ in range(5):
        whole = zlib.crc32(zeros, whole)
    assert combine(zlib.crc32(b"x"), zlib.crc32(zeros * 5), 5 << 20) == whole


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "archive.pt"
    contents = [bytes(range(256)) * 300, b"", b"small", bytes(reversed(range(256))) * 200]
    segments = frame([Record(f"archive/{n}", content) for n, content in enumerate(contents)])
    with open(path, "wb") as stream:
        write(segments, lambda hole: [], stream)
    return path


@given(st.data())
def test_however_a_record_is_read_it_is_checked_once(archive, data):
    """Runs in any order, twice, overlapping, with gaps, or none of them at all."""
    content, runs = archive.read_bytes(), RunsRead()
    records = list(read(archive).values())
    with open(archive, "rb") as stream:
        runs.open(str(archive), stream.fileno())
    for _ in range(data.draw(st.integers(0, 12))):
        record = data.draw(st.sampled_from([one for one in records if one.nbytes]))
        low, high = sorted(data.draw(st.tuples(*[st.integers(0, record.nbytes)] * 2)))
        start, end = record.offset + low, record.offset + high
        runs.add(str(archive), start, memoryview(content)[start:end])
    found = check(archive, runs.taken().get(str(archive), []))
    assert not found.damaged
    assert check(archive).nbytes == sum(record.nbytes for record in records)


def test_a_run_that_was_read_wrong_is_found(archive):
    first = read(archive)["archive/0"]
    runs = [Run(first.offset, first.offset + 1000, 1)]
    assert [record.name for record in check(archive, runs).damaged] == ["archive/0"]


def test_many_short_runs_are_forgotten_and_read_again(archive, monkeypatch):
    monkeypatch.setattr(source_checksums, "_MOST_RUNS", 8)
    content, runs = archive.read_bytes(), RunsRead()
    first = read(archive)["archive/0"]
    with open(archive, "rb") as stream:
        runs.open(str(archive), stream.fileno())
    for start in range(first.offset, first.offset + first.nbytes, 100):
        runs.add(str(archive), start, memoryview(content)[start : start + 50])
    (kept,) = runs.taken().values() or [[]]
    assert len(kept) <= 8 and not check(archive, kept).damaged
