"""What the benchmarks share: subjects that take turns on one input, what their runs were, and how
that is told."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.measure import REPOSITORY, Measured, run

WORKERS = 2
COPY, PARAMMAP = "cp -r, fsync of each file", f"parammap, {WORKERS} workers"
_HEADINGS = "wall, median (min..max)", "written", "processor time", "peak memory (PSS of the tree)"
_COPY = 'cp -r "$0" "$1" && find "$1" -exec sync {} +'


def copy(source: Path, target: Path) -> list[str]:
    """The command that copies a folder and makes the copy durable."""
    return ["sh", "-c", _COPY, str(source), str(target)]


def convert(source: Path, target: Path, framework: str) -> list[str]:
    """The command that converts a checkpoint with ParamMap."""
    return [
        sys.executable,
        "-m",
        "parammap",
        "convert",
        str(source),
        str(target),
        "--to",
        framework,
        "--workers",
        str(WORKERS),
    ]


@dataclass(slots=True)
class Series:
    """One subject at one size: its counted runs, and the peak memory and bytes written of the
    first, uncounted one."""

    peak_bytes: int = 0
    written: int = 0
    runs: list[Measured] = field(default_factory=list)

    @classmethod
    def begun(cls, command: Sequence[str], source: Path, target: Path) -> Series:
        """Run the first round, which measures memory (sampling would slow the others); its target
        stays."""
        peak = take_turn(command, source, target, sample_memory=True).peak_bytes
        return cls(peak, sum(path.stat().st_size for path in target.rglob("*") if path.is_file()))

    @property
    def wall(self) -> float:
        return statistics.median(measured.wall for measured in self.runs)

    def cells(self) -> tuple[str, ...]:
        """What stands under _HEADINGS."""
        walls, cpu = (
            [measured.wall for measured in self.runs],
            statistics.median(measured.cpu for measured in self.runs),
        )
        return (
            f"{self.wall:.2f} s ({min(walls):.2f}..{max(walls):.2f}, {len(walls)} runs)",
            f"{self.written / 1e9:.2f} GB",
            f"{cpu:.2f} s",
            f"{self.peak_bytes / 1e6:.0f} MB",
        )


def take_turn(
    command: Sequence[str], source: Path, target: Path, sample_memory: bool = False
) -> Measured:
    """Run a subject's command: without its target, its input in the page cache, nothing left to be
    written back."""
    shutil.rmtree(target, ignore_errors=True)
    _bring_into_cache(source)
    os.sync()
    return run(command, REPOSITORY, sample_memory)


def _bring_into_cache(folder: Path) -> None:
    buffer = bytearray(1 << 20)
    for path in filter(Path.is_file, folder.rglob("*")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def table(headings: Sequence[str], rows: Iterable[tuple[Sequence[str], Series]]) -> list[str]:
    """Lines of Markdown: under `headings` what each series is of, and then what its runs took."""
    cells = [
        (*headings, *_HEADINGS),
        ["---"] * (len(headings) + len(_HEADINGS)),
        *((*of, *one.cells()) for of, one in rows),
    ]
    return [f"| {' | '.join(line)} |" for line in cells]


def circumstances(series: Iterable[Series]) -> str:
    """What else the machine did during the counted runs."""
    others = statistics.median(
        measured.others_cpu / measured.wall for one in series for measured in one.runs
    )
    return (
        f"{os.cpu_count()} cores; the machine's other processes (kernel threads included) took "
        f"{others:.1f} cores in "
        f"the median run; load average now {os.getloadavg()[0]:.1f}"
    )
