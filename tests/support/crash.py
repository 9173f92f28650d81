"""Conversions that are killed, or whose disk fails, at each call that changes the disk.

`python -m tests.support.crash [JOBS]` (make crash) tries every call of every scenario in three ways:
the process is killed before it, or it fails with ENOSPC, or with EIO. After each, what lies in the
target's place must be whole, what was said one line, and the same command must end with the bytes of
an undisturbed run. Each run is a child of this process, forked after all imports."""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
import shutil
import signal
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from parammap.cli import main, running
from parammap.job.conversion import convert
from parammap.job.fingerprint import program
from parammap.job.request import Request
from tests.support import paths

DATA = paths.TESTS / "data"
#: calls that change the disk whenever they succeed, with the number of paths that they begin with
_CALLS = {"rename": 2, "replace": 2, "link": 2, "symlink": 2, "mkdir": 1, "unlink": 1}
_CALLS |= {"remove": 1, "rmdir": 1, "truncate": 1, "fsync": 0, "ftruncate": 0}
#: calls on a descriptor that do if it is of a file
_WRITES = ("write", "pwrite", "writev", "sendfile")
_CREATES = os.O_CREAT | os.O_TRUNC
KILLED = -signal.SIGKILL
#: of a scenario's writes, of which most are alike, so many are tried
MOST_WRITES = 60
#: ways of failing
KILL, ENOSPC, EIO = "kill", "ENOSPC", "EIO"


class Fault:
    """Counts the calls that change the disk from when it is put in place, in this process; before
    call number `at` it does what `how` says."""

    def __init__(self, how: str = "", at: int = -1) -> None:
        self.how, self.at = how, at
        self.names: list[str] = []
        self._numbers = itertools.count()

    def install(self) -> None:
        for name, paths_ in _CALLS.items():
            setattr(os, name, self._wrapped(getattr(os, name), paths_, lambda *_: True))
        for name in _WRITES:
            setattr(os, name, self._wrapped(getattr(os, name), 0, _is_file))
        opening = self._wrapped(os.open, 1, lambda path, flags, *_: flags & _CREATES)
        os.open = opening
        original = io.open

        @wraps(original)
        def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            """A file object's own calls are not Python's: what it flushes counts as a write."""
            if not set(mode) & set("wxa+") or isinstance(file, int):
                return original(file, mode, *args, **options)
            options["opener"] = lambda path, flags: opening(path, flags, 0o666)
            stream = original(file, mode, *args, **options)
            stream.flush = self._wrapped(stream.flush, 0, lambda *_: True)
            return stream

        builtins.open = io.open = opened

    def _wrapped(
        self, call: Callable[..., Any], paths_: int, counts: Callable[..., Any]
    ) -> Callable[..., Any]:
        @wraps(call)
        def wrapped(*args: Any, **options: Any) -> Any:
            if counts(*args):
                self._strike(call.__name__, args[:paths_])
            return call(*args, **options)

        return wrapped

    def _strike(self, name: str, names: Sequence[Any]) -> None:
        number = next(self._numbers)
        self.names.append(name)
        if number != self.at:
            return
        if self.how == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.how)
        files = [None, *names[1:]] if len(names) == 2 else []
        raise OSError(code, os.strerror(code), *names[:1], *files)


def _is_file(descriptor: int, *_: object) -> bool:
    return descriptor > 2 and stat.S_ISREG(os.fstat(descriptor).st_mode)


@dataclass(frozen=True)
class Ended:
    """How a run ended: its status (negative: the signal), and what it said on standard error."""

    status: int
    said: str
    names: list[str] = field(default_factory=list)


def run(request: Request, fault: Fault | None = None) -> Ended:
    """The conversion in a child process, as the command line runs it, with a fault. `names` are the
    calls counted, of a run that ended by itself."""
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as calls:
        child = os.fork()
        if not child:
            status = 99
            try:
                os.environ.pop(main.TRACEBACK, None)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(errors.fileno(), 2)
                sys.stdout, sys.stderr = (
                    open(number, "w", closefd=False)  # noqa: SIM115
                    for number in (1, 2)
                )
                if fault:
                    write = os.write
                    fault.install()
                status = main.run(lambda: running.tell(convert(request)))
                if fault:
                    write(calls.fileno(), "\n".join(fault.names).encode())
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        calls.seek(0)
        return Ended(os.waitstatus_to_exitcode(status), errors.read(), calls.read().split())


def contents(folder: Path) -> dict[str, bytes] | None:
    """The files of a folder by path; None if there is no such folder."""
    if not folder.is_dir():
        return None
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True)
class Scenario:
    """A conversion as `asked`, into a folder in which `prepare` puts something before."""

    name: str
    asked: dict[str, Any]
    prepare: Callable[[Path], None]

    def request(self, place: Path, **more: Any) -> Request:
        return Request(target=place / "out", workers=1, quiet=True, **{**self.asked, **more})

    @property
    def overwrites(self) -> bool:
        return bool(self.asked.get("overwrite"))


def _nothing(place: Path) -> None:
    """The target is not there."""


def _old(place: Path) -> None:
    """The target holds another checkpoint."""
    for name in ("iter_0000001/mp_rank_00/model_optim_rng.pt", "iter_0000001/notes", "tracker"):
        file = place / "out" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode() * 99)


def _part(place: Path) -> None:
    """The target holds the other part of the conversion."""
    assert run(_PARTS.request(place, only_pp=frozenset({1}))).status == 0


_LLAMA = {"source": DATA / "transformers/llama_hf", "to": "megatron"}
_GPT = {"source": DATA / "megatron/torch_dist_in_order_of_keys", "to": "mindspore"}
_PARTS = Scenario("the last part", {**_LLAMA, "sizes": {"pp": 2}, "only_pp": frozenset({0})}, _part)
OVER = Scenario("over another", {**_LLAMA, "sizes": {"tp": 2}, "overwrite": True}, _old)
SCENARIOS = [
    Scenario("into a new folder", {**_LLAMA, "sizes": {"tp": 2}}, _nothing),
    OVER,
    Scenario("MindSpore's over another", {**_GPT, "overwrite": True}, _old),
    _PARTS,
]


@dataclass(frozen=True)
class Trial:
    """A scenario, the bytes that lie there before and after it, and the calls of a whole run."""

    scenario: Scenario
    old: dict[str, bytes] | None
    new: dict[str, bytes] | None
    names: list[str]

    def points(self, most_writes: int) -> list[int]:
        """Numbers of calls: all but writes, and so many of these."""
        writes = [number for number, name in enumerate(self.names) if name in _WRITES]
        left = set(writes) - set(writes[:: max(len(writes) // most_writes, 1)])
        return [number for number in range(len(self.names)) if number not in left]


def trial_of(scenario: Scenario) -> Trial:
    with _place() as place:
        scenario.prepare(place)
        old = contents(place / "out")
        ended = run(scenario.request(place), Fault())
        assert ended.status == 0 and ended.names, ended
        return Trial(scenario, old, contents(place / "out"), ended.names)


def faults_of(trial: Trial, how: str, at: int, is_again_without: bool = False) -> list[str]:
    """What is wrong with a run that such a fault meets, and with the one after it; nothing, if all
    is well. `is_again_without`: that one is without --overwrite."""
    with _place() as place:
        out = place / "out"
        trial.scenario.prepare(place)
        first = run(trial.scenario.request(place), Fault(how, at))
        wrong = [*_wrong_status(first, how), *_wrong_line(first), *_wrong_place(trial, out, first)]
        again = run(
            trial.scenario.request(place, **({"overwrite": False} if is_again_without else {}))
        )
        there = contents(out)
        if again.status == 0:
            wrong += ["the next run ends with other bytes"] if there != trial.new else []
            wrong += [f"is left: {name}" for name in sorted(os.listdir(place)) if name != "out"]
        elif not is_again_without or again.status != 2 or there != trial.old:
            wrong.append(f"the next run: {again.status} {again.said!r}")
        where = f"{trial.scenario.name}: {how} at call {at} ({trial.names[at]})"
        return [f"{where}: {one}; {first.status} {first.said!r}" for one in wrong]


def _wrong_status(ended: Ended, how: str) -> list[str]:
    if how == KILL:
        return [] if ended.status == KILLED else ["was not killed"]
    return [] if ended.status in (0, 2, 3) else [f"has status {ended.status}"]


def _wrong_line(ended: Ended) -> list[str]:
    """A run that failed says so in a line that names a file."""
    if ended.status in (0, KILLED):
        return []
    lines = ended.said.splitlines()
    is_fine = len(lines) == 1 and lines[0].startswith("parammap: /")
    return [] if is_fine else ["did not say one line that names a file"]


def _wrong_place(trial: Trial, out: Path, ended: Ended) -> list[str]:
    """The target is whole; or, between two renames, missing, and whole nearby."""
    there = contents(out)
    if there is None and ended.status == KILLED:
        there = contents(out.with_name(".out.parammap") / "old")
    wanted = [trial.new] if ended.status == 0 else [trial.old, trial.new]
    return [] if there in wanted else ["the target is neither the old nor the new one"]


@contextmanager
def _place() -> Iterator[Path]:
    """A folder of a path of its own, the same each time: it is part of what is written."""
    path = Path(tempfile.gettempdir()) / f"parammap-crash-{os.getpid()}"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _tried(job: tuple[Trial, str, int, bool]) -> tuple[str, list[str]]:
    trial, how, at, is_again_without = job
    return f"{trial.scenario.name}: {how}", faults_of(trial, how, at, is_again_without)


def _jobs(trials: Sequence[Trial]) -> Iterator[tuple[Trial, str, int, bool]]:
    for trial in trials:
        for at in trial.points(MOST_WRITES):
            for how in (KILL, ENOSPC, EIO):
                yield trial, how, at, False
            if trial.scenario.overwrites:
                yield trial, KILL, at, True


def _main(jobs: int) -> int:
    program()  # remembered, so that an edit meanwhile is no other program
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    work = list(_jobs([trial_of(scenario) for scenario in SCENARIOS]))
    points = len({(trial.scenario.name, at) for trial, _, at, _ in work})
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        for kind, found in pool.map(_tried, work, chunksize=8):
            counts[kind] += 1
            wrong += found
            for one in found:
                print(one, flush=True)
    for kind, count in counts.items():
        print(f"{count:6} {kind}")
    print(f"{points} calls, {len(work)} faults, {len(wrong)} of them with something wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]) if len(sys.argv) > 1 else 2))
