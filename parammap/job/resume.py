"""What an earlier, killed run left, trusted only as far as it is proved."""

from __future__ import annotations

from pathlib import Path

from parammap.execute.source_checksums import crc32_of
from parammap.execute.writer import Outcome
from parammap.proof.stream import in_processes


def intact(done: dict[str, Outcome], folder: Path, workers: int) -> dict[str, Outcome]:
    """The outcomes of files in `folder` that are as they were written; the others must be written
    again."""
    outcomes = list(done.values())
    found = in_processes(lambda outcome: crc32_of(folder / outcome.path), outcomes, workers)
    return {one.path: one for one, crc in zip(outcomes, found, strict=True) if crc == one.crc32}
