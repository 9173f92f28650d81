"""Measures a command: wall time, processor time of the command and of everyone else, peak memory of
its process tree; and the plan of a conversion, beside what it may take."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.02
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds on the clock, processor seconds of the command and of other processes meanwhile,
    bytes (None: unsampled)."""

    wall: float
    cpu: float
    others_cpu: float
    peak_bytes: int | None
    output: str


def run(command: Sequence[str], cwd: Path, sample_memory: bool = False) -> Measured:
    """Run a command to its end, as users do: Python may keep what it compiles. Raises RuntimeError
    with its output if it fails."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    busy, own, started = _busy_seconds(), _children_seconds(), time.monotonic()
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    sampler = _Sampler(process.pid) if sample_memory else None
    output, _ = process.communicate()
    wall = time.monotonic() - started
    peak = sampler.stop() if sampler else None
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: status {process.returncode}\n{output}")
    cpu = _children_seconds() - own
    return Measured(wall, cpu, max(0.0, _busy_seconds() - busy - cpu), peak, output)


def plan(
    title: str, source: Path, flags: Sequence[str], max_seconds: float, max_bytes: float
) -> bool:
    """Print what the dry run of converting SRC takes (read, plan, proof that each element is
    written once); whether that is within the targets."""
    sizes = [path.stat() for path in source.rglob("*") if path.is_file()]
    print(
        f"{title}: {len(sizes)} files of {sum(size.st_size for size in sizes) / 1e12:.2f} TB that "
        f"take "
        f"{sum(size.st_blocks for size in sizes) * 512 / 1e6:.0f} MB of disk; {' '.join(flags)}",
        flush=True,
    )
    measured = run(
        [
            sys.executable,
            "-m",
            "parammap",
            "convert",
            str(source),
            str(source.with_name(f"{source.name}_out")),
            "--dry-run",
            *flags,
        ],
        REPOSITORY,
        sample_memory=True,
    )
    print(measured.output.strip().splitlines()[-1])
    within = measured.wall <= max_seconds and measured.peak_bytes <= max_bytes
    print(
        f"{title}: {measured.wall:.1f} s (target {max_seconds}), peak memory "
        f"{measured.peak_bytes / 1e6:.0f} MB "
        f"(target {max_bytes / 1e6:.0f}), processor time {measured.cpu:.1f} s on {os.cpu_count()} "
        f"cores, of which others "
        f"took {measured.others_cpu / measured.wall:.1f}: {'within' if within else 'MISSED'}",
        flush=True,
    )
    return within


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _busy_seconds() -> float:
    """Processor seconds that all processes and the kernel have used since the start of the machine
    (proc(5), stat)."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split()[1:11]
    )
    return (user + nice + system + irq + softirq) / _TICKS


class _Sampler(threading.Thread):
    """Sums the proportional set sizes of a process and its descendants, again and again; keeps the
    highest sum."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root, self.peak, self.done = root, 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, sum(map(_pss, _tree(self.root))))

    def stop(self) -> int:
        self.done.set()
        self.join()
        return self.peak


def _tree(root: int) -> list[int]:
    found = [root]
    for process in found:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            found += [int(child) for child in _read(children).split()]
    return found


def _pss(process: int) -> int:
    lines = _read(Path(f"/proc/{process}/smaps_rollup")).splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def _read(path: Path) -> str:
    """What a /proc file says; nothing of a process that has ended."""
    try:
        return path.read_text()
    except OSError:
        return ""
