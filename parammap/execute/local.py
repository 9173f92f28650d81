"""Execution of a plan: one task per output file, in local processes.

Tasks share nothing. A task writes into the staging folder under a temporary name, makes the file
durable and renames it. Small files go in batches, so that the disk is waited for while the next
ones are written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from uuid import uuid4

from parammap.errors import TaskError, told
from parammap.execute import durable
from parammap.execute.lifeline import Lifeline
from parammap.execute.progress import Progress
from parammap.execute.writer import Outcome, Writer
from parammap.plan.plan import FileTask

WRITEBACK_BYTES = 32 << 20
#: of a batch of files: what they may have together, and how many they may be
_BATCH_BYTES, _BATCH_FILES = 128 << 20, 256


def run_tasks(
    tasks: list[FileTask],
    staging: Path,
    workers: int,
    progress: Progress,
    timeout: float | None = None,
) -> Iterator[Outcome]:
    """Run the tasks, each in one of `workers` processes (in this one if 1); yields outcomes as they
    come.

    Raises TaskError when a task fails, a worker dies or `timeout` seconds are over; tasks under way
    are then waited for, the rest is not begun."""
    deadline = time.monotonic() + timeout if timeout else float("inf")
    if workers == 1:
        for task in tasks:
            check_time(deadline, staging)
            yield from run_batch([task], staging, progress.advance)
        return
    shared = _Shared(_batches(tasks, workers), staging, progress)
    failure: BaseException | None = None
    with (
        closing(Lifeline()) as lifeline,
        ProcessPoolExecutor(workers, get_context("fork"), _share, (shared, lifeline)) as pool,
    ):
        pending = {pool.submit(_run_shared, number) for number in range(len(shared.batches))}
        try:
            while pending:
                check_time(deadline, staging)
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    if error := future.exception():
                        failure = failure or error
                        pending = {other for other in pending if not other.cancel()}
                    else:
                        yield from future.result()
                progress.show()
        finally:
            pool.shutdown(cancel_futures=True)
    if isinstance(failure, BrokenProcessPool):
        raise TaskError(
            f"{staging}: a worker process was killed; run the same command again to go on from here"
        )
    if failure:
        raise failure


def check_time(deadline: float, staging: Path) -> None:
    """Raises TaskError once `deadline`, of time.monotonic(), has passed."""
    if time.monotonic() > deadline:
        raise TaskError(
            f"{staging}: the time allowed is over; allow more, and the run goes on from here"
        )


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the workers inherit by fork, so that a plan is never pickled."""

    batches: list[list[FileTask]]
    staging: Path
    progress: Progress


_shared: _Shared


def _share(shared: _Shared, lifeline: Lifeline) -> None:
    global _shared
    _shared = shared
    lifeline.hold()


def _run_shared(number: int) -> list[Outcome]:
    return run_batch(_shared.batches[number], _shared.staging, _shared.progress.add)


def _batches(tasks: list[FileTask], workers: int) -> list[list[FileTask]]:
    """The tasks in their order, as many of them together as a batch may have and every worker still
    gets several."""
    limit = min(_BATCH_BYTES, sum(task.nbytes for task in tasks) // (4 * workers))
    batches: list[list[FileTask]] = []
    room = 0
    for task in tasks:
        if not batches or task.nbytes > room or len(batches[-1]) == _BATCH_FILES:
            batches.append([])
            room = limit
        batches[-1].append(task)
        room -= task.nbytes
    return batches


def run_batch(
    tasks: list[FileTask], staging: Path, report: Callable[[int], None], scratch: Path | None = None
) -> list[Outcome]:
    """Write the tasks' files, in `scratch` or beside their places below `staging` (one file
    system); each is made durable and renamed to its place while the next ones are written.

    Calls `report` with numbers of bytes as they are written. Raises TaskError.
    """
    outcomes, published = [], []
    with ThreadPoolExecutor(1) as disk:
        for task in tasks:
            target = staging / task.path
            with told(TaskError, target):
                target.parent.mkdir(parents=True, exist_ok=True)
                out = _Output(
                    scratch / uuid4().hex if scratch else target.with_name(f"{target.name}.tmp")
                )
                outcomes.append(out.fill(Writer(task, out, report).write))
                published.append((target, disk.submit(out.publish, target)))
    for target, done in published:
        with told(TaskError, target):
            done.result()
    return outcomes


class _Output:
    """A new file, written front to back, and on its way to the disk while it grows, so that fsync
    finds little left.

    Linux begins to write pages back when told that they are not needed (mm/fadvise.c); those still
    dirty stay cached."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self.written = self.begun = 0

    def write(self, data: bytes | memoryview) -> None:
        durable.write(self.descriptor, data)
        self.written += len(data)
        if self.written - self.begun >= WRITEBACK_BYTES:
            os.posix_fadvise(
                self.descriptor, self.begun, self.written - self.begun, os.POSIX_FADV_DONTNEED
            )
            self.begun = self.written

    def fill(self, write: Callable[[], Outcome]) -> Outcome:
        """What `write` returns, which fills it; it is removed if that fails."""
        try:
            return write()
        except BaseException:
            os.close(self.descriptor)
            self.path.unlink(missing_ok=True)
            raise

    def publish(self, target: Path) -> None:
        """Make it durable, and give it its name."""
        try:
            os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)
        os.replace(self.path, target)
