"""The benchmark: ParamMap, there, back and to another layout, beside `cp -r` and torch.load +
mindspore.save_checkpoint.

On one machine all take turns, round after round. Every side makes what it wrote durable before its
clock stops, and finds its input in the page cache. A first round, which does not count, measures
memory (sampling would slow the others) and compares the results with each other. The report on
standard output is Markdown, as docs/speed.md shows it."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.compare import same_checkpoint, same_conversion  # noqa: E402
from bench.measure import run  # noqa: E402
from bench.rounds import COPY, PARAMMAP, Series, circumstances, convert, copy, table, take_turn  # noqa: E402

POOL = 4


def _convert(source: Path, target: Path) -> list[str]:
    return convert(source, target, "mindspore")


def _convert_back(source: Path, target: Path) -> list[str]:
    return convert(source, target, "megatron")


def _relay(source: Path, target: Path) -> list[str]:
    return [*convert(source, target, "megatron"), "--tp", "4", "--pp", "1"]


def _relay_back(source: Path, target: Path) -> list[str]:
    return [*convert(source, target, "megatron"), "--tp", "2", "--pp", "2"]


def _load_and_save(source: Path, target: Path) -> list[str]:
    (iteration,) = source.glob("iter_*")
    return [
        sys.executable,
        "bench/baseline.py",
        str(iteration),
        str(target),
        "--processes",
        str(POOL),
    ]


BACK, RELAID, TODAY = (
    "parammap, back to Megatron-LM",
    "parammap, tp2·pp2 to tp4·pp1",
    f"torch + mindspore, pool of {POOL}",
)
SUBJECTS: dict[str, Callable[[Path, Path], list[str]]] = {
    COPY: copy,
    PARAMMAP: _convert,
    BACK: _convert_back,
    RELAID: _relay,
    TODAY: _load_and_save,
}


@dataclass(slots=True)
class Bench:
    """All series, by size in bytes and subject; `converted` is what the way back starts from."""

    folder: Path
    sources: dict[int, Path]
    converted: dict[int, Path]
    series: dict[tuple[int, str], Series] = field(default_factory=dict)

    def first_round(self) -> None:
        for size, source in self.sources.items():
            compared = size == min(self.sources)
            results = {
                subject: self.folder / f"out_{number}" for number, subject in enumerate(SUBJECTS)
            }
            for subject, target in results.items():
                self.series[size, subject] = Series.begun(
                    self._command(size, subject, target), self._source(size, subject), target
                )
                if not compared:
                    shutil.rmtree(target)
            if compared:
                same_conversion(results[PARAMMAP], results[TODAY])
                same_checkpoint(source, results[BACK])
                results["circle"] = self.folder / "circle"
                run(_relay_back(results[RELAID], results["circle"]), REPOSITORY)
                same_checkpoint(source, results["circle"])
                for target in results.values():
                    shutil.rmtree(target)

    def count(self, number: int, subjects: list[str]) -> None:
        """One round; each begins with another subject, so that nobody always comes after the same
        one."""
        start = number % len(subjects)
        for size in self.sources:
            for subject in subjects[start:] + subjects[:start]:
                target = self.folder / "out"
                measured = take_turn(
                    self._command(size, subject, target), self._source(size, subject), target
                )
                self.series[size, subject].runs.append(measured)
                shutil.rmtree(target)
                print(
                    f"round {number + 1}  {size / 1e9:g} GB  {subject:32} {measured.wall:6.2f} s  "
                    f"(others took "
                    f"{measured.others_cpu / measured.wall:.1f} cores)",
                    file=sys.stderr,
                    flush=True,
                )

    def _source(self, size: int, subject: str) -> Path:
        return (self.converted if subject == BACK else self.sources)[size]

    def _command(self, size: int, subject: str, target: Path) -> list[str]:
        return SUBJECTS[subject](self._source(size, subject), target)


def report(bench: Bench) -> list[str]:
    rows = (
        ((f"{size / 1e9:g} GB", subject), series)
        for (size, subject), series in bench.series.items()
    )
    return [*table(["optimizer files", ""], rows), "", *_targets(bench)]


def _targets(bench: Bench) -> list[str]:
    """What was asked for beside what was measured, a column for each size."""
    walls = {key: series.wall for key, series in bench.series.items()}
    peaks = {key: series.peak_bytes for key, series in bench.series.items()}
    rows = {
        ("parammap's wall time in cp's", "≤ 1.5"): lambda size: (
            f"{walls[size, PARAMMAP] / walls[size, COPY]:.2f}"
        ),
        ("the way back's wall time in cp's (of as many bytes as it writes)", "≤ 2"): lambda size: (
            f"{walls[size, BACK] / walls[size, COPY]:.2f}"
        ),
        ("times faster than torch + mindspore", "≥ 5"): lambda size: (
            f"{walls[size, TODAY] / walls[size, PARAMMAP]:.1f}"
        ),
    }
    rows["re-layout's wall time in cp's", "≤ 2"] = lambda size: (
        f"{walls[size, RELAID] / walls[size, COPY]:.2f}"
    )
    for subject, name in (
        (PARAMMAP, "parammap's"),
        (BACK, "the way back's"),
        (RELAID, "re-layout's"),
    ):
        smallest = peaks[min(bench.sources), subject]
        rows[f"{name} peak memory", "≤ 150 MB"] = lambda size, subject=subject: (
            f"{peaks[size, subject] / 1e6:.0f} MB"
        )
        rows[f"{name} growth from the smallest size", "≤ 10 %"] = (
            lambda size, subject=subject, smallest=smallest: (
                f"{peaks[size, subject] / smallest - 1:.1%}" if size > min(bench.sources) else ""
            )
        )
    return [
        "| | target |" + "".join(f" {size / 1e9:g} GB |" for size in bench.sources),
        "|---|---|" + "---|" * len(bench.sources),
        *(
            f"| {name} | {target} |" + "".join(f" {value(size)} |" for size in bench.sources)
            for (name, target), value in rows.items()
        ),
    ]


def _circumstances(bench: Bench) -> str:
    runs = [measured for series in bench.series.values() for measured in series.runs]
    imports = statistics.median(
        float(line.split()[1])
        for measured in runs
        for line in measured.output.splitlines()
        if line.startswith("imports ")
    )
    return (
        f"{circumstances(bench.series.values())}; importing torch and mindspore is {imports:.1f} s "
        f"of each run that "
        "needs them"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--runs", type=int, default=5, help="counted runs of each side (default: %(default)s)"
    )
    parser.add_argument(
        "--baseline-runs", type=int, default=5, help="of torch + mindspore (default: %(default)s)"
    )
    parser.add_argument(
        "--sizes", default="1,3", help="GB of optimizer files (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=REPOSITORY / ".cache" / "bench", help="where files are made"
    )
    args = parser.parse_args()
    missing = [name for name in ("torch", "mindspore") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"bench: {' and '.join(missing)} not installed; `make setup` does that")
    args.folder.mkdir(parents=True, exist_ok=True)
    sources = {int(float(size) * 1e9): _source(size, args.folder) for size in args.sizes.split(",")}
    bench = Bench(
        args.folder, sources, {size: _converted(source) for size, source in sources.items()}
    )
    bench.first_round()
    wanted = dict.fromkeys(SUBJECTS, args.runs) | {TODAY: args.baseline_runs}
    for number in range(max(wanted.values())):
        bench.count(number, [subject for subject, runs in wanted.items() if number < runs])
    print("\n".join(report(bench)))
    print(
        f"\n{_circumstances(bench)}\n\nDigest, one "
        f"core:\n\n```\n{_output('bench/digest_speed.py')}\n```"
    )


def _source(gigabytes: str, folder: Path) -> Path:
    return Path(_output("bench/make_checkpoint.py", str(folder), "--gigabytes", gigabytes))


def _converted(source: Path) -> Path:
    """The MindSpore checkpoint that the way back starts from: made anew by today's converter,
    beside its source."""
    target = source.with_name(source.name.replace("megatron", "mindspore", 1))
    shutil.rmtree(target, ignore_errors=True)
    run(_convert(source, target), REPOSITORY)
    return target


def _output(*command: str) -> str:
    return subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
