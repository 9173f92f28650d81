"""Execution of a plan: one task per output file, in local processes.

Tasks share nothing. A task writes into the staging folder under a temporary name, makes the file durable and renames it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from .errors import TaskError
from .plan import FileTask
from .progress import Progress
from .writer import Outcome, Writer

WRITEBACK_BYTES = 32 << 20


def run_tasks(tasks: list[FileTask], staging: Path, workers: int, progress: Progress,
              timeout: float | None = None) -> Iterator[Outcome]:
    """Run the tasks, each in one of `workers` processes (in this one if 1); yields outcomes as they come.

    Raises TaskError when a task fails, a worker dies or `timeout` seconds are over; tasks under way are then waited for,
    the rest is not begun.
    """
    deadline = time.monotonic() + timeout if timeout else float("inf")
    if workers == 1:
        for task in tasks:
            check_time(deadline, staging)
            yield run_task(task, staging, _temporary(task, staging), progress.advance)
        return
    shared, failure = _Shared(tasks, staging, progress), None
    with ProcessPoolExecutor(workers, get_context("fork"), _share, (shared,)) as pool:
        pending = {pool.submit(_run_shared, number) for number in range(len(tasks))}
        try:
            while pending:
                check_time(deadline, staging)
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    if error := future.exception():
                        failure = failure or error
                        pending = {other for other in pending if not other.cancel()}
                    else:
                        yield future.result()
                progress.show()
        finally:
            pool.shutdown(cancel_futures=True)
    if isinstance(failure, BrokenProcessPool):
        raise TaskError(f"{staging}: a worker process was killed; run the same command again to go on from here")
    if failure:
        raise failure


def check_time(deadline: float, staging: Path) -> None:
    """Raises TaskError once `deadline`, of time.monotonic(), has passed."""
    if time.monotonic() > deadline:
        raise TaskError(f"{staging}: the time allowed is over; allow more, and the run goes on from here")


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the workers inherit by fork, so that a plan is never pickled."""

    tasks: list[FileTask]
    staging: Path
    progress: Progress


_shared: _Shared | None = None


def _share(shared: _Shared) -> None:
    global _shared
    _shared = shared


def _run_shared(number: int) -> Outcome:
    task, staging = _shared.tasks[number], _shared.staging
    return run_task(task, staging, _temporary(task, staging), _shared.progress.add)


def _temporary(task: FileTask, staging: Path) -> Path:
    return staging / (task.path + ".tmp")


def run_task(task: FileTask, staging: Path, temporary: Path, report: Callable[[int], None]) -> Outcome:
    """Write the task's file as `temporary` and rename it to its place below `staging`, one file system.

    Calls `report` with numbers of bytes as they are written. Raises TaskError.
    """
    target = staging / task.path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _Output(temporary) as out:
            outcome = Writer(task, out, report).write()
            os.fsync(out.descriptor)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TaskError(f"{target}: {error.strerror or error}") from error
    return outcome


class _Output:
    """A new file, written front to back, and on its way to the disk while it grows, so that fsync finds little left.

    Linux begins to write pages back when told that they are not needed (mm/fadvise.c); those still dirty stay cached.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self.written = self.begun = 0

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_) -> None:
        os.close(self.descriptor)

    def write(self, data: bytes | memoryview) -> None:
        while data:
            count = os.write(self.descriptor, data)
            self.written += count
            data = data[count:]
        if self.written - self.begun >= WRITEBACK_BYTES:
            os.posix_fadvise(self.descriptor, self.begun, self.written - self.begun, os.POSIX_FADV_DONTNEED)
            self.begun = self.written
