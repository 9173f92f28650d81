"""The benchmark: ParamMap beside `cp -r` and beside torch.load + mindspore.save_checkpoint, in turn, on one machine.

Every side makes what it wrote durable before its clock stops, and finds its input in the page cache. A first round, which
does not count, measures memory (sampling would slow the others) and compares the results with each other.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.measure import Measured, run  # noqa: E402
from convert.containers import mindspore_ckpt  # noqa: E402

WORKERS, POOL = 2, 4
_COPY = 'cp -r "$0" "$1" && find "$1" -exec sync {} +'


def _copy(source: Path, target: Path) -> list[str]:
    return ["sh", "-c", _COPY, str(source), str(target)]


def _convert(source: Path, target: Path) -> list[str]:
    return [sys.executable, "-m", "convert", "convert", str(source), str(target), "--to", "mindspore",
            "--workers", str(WORKERS)]


def _load_and_save(source: Path, target: Path) -> list[str]:
    iteration, = source.glob("iter_*")
    return [sys.executable, "bench/baseline.py", str(iteration), str(target), "--processes", str(POOL)]


COPY, PARAMMAP, TODAY = "cp -r, fsync of each file", f"parammap, {WORKERS} workers", f"torch + mindspore, pool of {POOL}"
SUBJECTS: dict[str, Callable[[Path, Path], list[str]]] = {COPY: _copy, PARAMMAP: _convert, TODAY: _load_and_save}


@dataclass(slots=True)
class Series:
    """One subject at one size: its counted runs, and the peak memory and bytes written of the first, uncounted one."""

    peak_bytes: int = 0
    written: int = 0
    runs: list[Measured] = field(default_factory=list)

    @property
    def wall(self) -> float:
        return statistics.median(measured.wall for measured in self.runs)


@dataclass(slots=True)
class Bench:
    """All series, by size in bytes and subject."""

    folder: Path
    sources: dict[int, Path]
    series: dict[tuple[int, str], Series]

    def first_round(self) -> None:
        for size in self.sources:
            results = {}
            for subject in SUBJECTS:
                target = self.folder / f"out_{len(results)}"
                measured = self._run(size, subject, target, sample_memory=True)
                self.series[size, subject] = Series(measured.peak_bytes, _bytes_in(target))
                results[subject] = target
            if size == min(self.sources):
                _compare(results[PARAMMAP], results[TODAY])
            for target in results.values():
                shutil.rmtree(target)

    def count(self, number: int, subjects: list[str]) -> None:
        """One round; each begins with another subject, so that nobody always comes after the same one."""
        start = number % len(subjects)
        for size in self.sources:
            for subject in subjects[start:] + subjects[:start]:
                target = self.folder / "out"
                measured = self._run(size, subject, target)
                self.series[size, subject].runs.append(measured)
                shutil.rmtree(target)
                print(f"round {number + 1}  {size / 1e9:g} GB  {subject:32} {measured.wall:6.2f} s  (others took "
                      f"{measured.others_cpu / measured.wall:.1f} cores)", file=sys.stderr, flush=True)

    def _run(self, size: int, subject: str, target: Path, sample_memory: bool = False) -> Measured:
        shutil.rmtree(target, ignore_errors=True)
        _bring_into_cache(self.sources[size])
        os.sync()
        return run(SUBJECTS[subject](self.sources[size], target), REPOSITORY, sample_memory)


def _bring_into_cache(folder: Path) -> None:
    buffer = bytearray(1 << 20)
    for path in folder.rglob("*.pt"):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _compare(ours: Path, theirs: Path) -> None:
    """Both converters must have written the same tensors, whatever they call them. Raises SystemExit if not."""
    for rank in sorted(path.name for path in theirs.glob("rank_*")):
        if _contents(ours / rank / "network.ckpt") != _contents(theirs / rank / "network.ckpt"):
            sys.exit(f"bench: {rank}: the two conversions hold different tensors; their times cannot be compared")


def _contents(path: Path) -> Counter:
    """How often each (shape, hash of the bytes) occurs among the float32 tensors of more than one element."""
    found: Counter = Counter()
    with open(path, "rb") as file:
        for stored in mindspore_ckpt.read(path).values():
            if stored.dtype == "float32" and stored.numel > 1:
                digest = hashlib.blake2b()
                for extent in stored.extents:
                    file.seek(extent.offset)
                    digest.update(file.read(extent.nbytes))
                found[stored.shape, digest.digest()] += 1
    return found


def report(bench: Bench) -> list[str]:
    lines = ["| optimizer files | | wall, median (min..max) | written | processor time | peak memory (PSS of the tree) |",
             "|---|---|---|---|---|---|"]
    for (size, subject), series in bench.series.items():
        walls = [measured.wall for measured in series.runs]
        cpu = statistics.median(measured.cpu for measured in series.runs)
        lines.append(f"| {size / 1e9:g} GB | {subject} | {series.wall:.2f} s ({min(walls):.2f}..{max(walls):.2f}, "
                     f"{len(walls)} runs) | {series.written / 1e9:.2f} GB | {cpu:.2f} s "
                     f"| {series.peak_bytes / 1e6:.0f} MB |")
    lines += ["", "| | target |" + "".join(f" {size / 1e9:g} GB |" for size in bench.sources),
              "|---|---|" + "---|" * len(bench.sources)]
    walls = {key: series.wall for key, series in bench.series.items()}
    peaks = [bench.series[size, PARAMMAP].peak_bytes for size in bench.sources]
    lines += [
        "| parammap's wall time in cp's | ≤ 1.5 |" + "".join(
            f" {walls[size, PARAMMAP] / walls[size, COPY]:.2f} |" for size in bench.sources),
        "| times faster than torch + mindspore | ≥ 5 |" + "".join(
            f" {walls[size, TODAY] / walls[size, PARAMMAP]:.1f} |" for size in bench.sources),
        "| parammap's peak memory | ≤ 150 MB |" + "".join(f" {peak / 1e6:.0f} MB |" for peak in peaks),
        f"| its growth from the smallest to the largest | ≤ 10 % | {max(peaks) / min(peaks) - 1:.1%} |"]
    return lines


def _circumstances(bench: Bench) -> str:
    runs = [measured for series in bench.series.values() for measured in series.runs]
    others = statistics.median(measured.others_cpu / measured.wall for measured in runs)
    imports = statistics.median(float(line.split()[1]) for measured in runs for line in measured.output.splitlines()
                                if line.startswith("imports "))
    return (f"{os.cpu_count()} cores; the machine's other processes (kernel threads included) took {others:.1f} cores in "
            f"the median run; load average now {os.getloadavg()[0]:.1f}; importing torch and mindspore is {imports:.1f} s "
            "of each run that needs them")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each side (default: %(default)s)")
    parser.add_argument("--baseline-runs", type=int, default=3, help="of torch + mindspore (default: %(default)s)")
    parser.add_argument("--sizes", default="1,3", help="GB of optimizer files (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / ".cache" / "bench", help="where files are made")
    args = parser.parse_args()
    missing = [name for name in ("torch", "mindspore") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"bench: {' and '.join(missing)} not installed; `make setup` does that")
    args.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.folder, {int(float(size) * 1e9): _source(size, args.folder) for size in args.sizes.split(",")}, {})
    bench.first_round()
    for number in range(max(args.runs, args.baseline_runs)):
        taking_part = {COPY: args.runs, PARAMMAP: args.runs, TODAY: args.baseline_runs}
        bench.count(number, [subject for subject, runs in taking_part.items() if number < runs])
    print("\n".join(report(bench)))
    print(f"\n{_circumstances(bench)}\n\nDigest, one core:", flush=True)
    subprocess.run([sys.executable, "bench/digest_speed.py"], cwd=REPOSITORY, check=True)


def _source(gigabytes: str, folder: Path) -> Path:
    made = subprocess.run([sys.executable, "bench/make_checkpoint.py", str(folder), "--gigabytes", gigabytes],
                          cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
    return Path(made.stdout.strip())


if __name__ == "__main__":
    main()
