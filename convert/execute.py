"""Execution of a plan: one task per output file, streamed through a fixed buffer, hashed and checked on the way.

Tasks share nothing. A task writes into the staging folder under a temporary name, makes the file durable and renames it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from .checks import Misfit, cast, compare
from .containers import frames
from .digest import MASK, bits_dtype, box_digest
from .errors import TaskError
from .plan import Copy, FileTask, Twin
from .progress import Progress
from .tensors import ITEMSIZE, Box, Tensor, TensorSpec

BUFFER_BYTES = 256 << 10
WRITEBACK_BYTES = 32 << 20
REPORT_BYTES = 8 << 20


@dataclass(slots=True)
class Outcome:
    """What a task found out: per (tensor, replica) the digest and the number of its elements; misfits; bytes written."""

    path: str
    nbytes: int
    digests: dict[tuple[Tensor, int], tuple[int, int]] = field(default_factory=dict)
    misfits: dict[Tensor, Misfit] = field(default_factory=dict)


def run_tasks(tasks: list[FileTask], staging: Path, workers: int, progress: Progress,
              timeout: float | None = None) -> Iterator[Outcome]:
    """Run the tasks, each in one of `workers` processes (in this one if 1); yields outcomes as they come.

    Raises TaskError when a task fails, a worker dies or `timeout` seconds are over; tasks under way are then waited for,
    the rest is not begun.
    """
    deadline = time.monotonic() + timeout if timeout else float("inf")
    if workers == 1:
        for task in tasks:
            _check_time(deadline, staging)
            yield _run(task, staging, progress.advance)
        return
    shared, failure = _Shared(tasks, staging, progress), None
    with ProcessPoolExecutor(workers, get_context("fork"), _share, (shared,)) as pool:
        pending = {pool.submit(_run_shared, number) for number in range(len(tasks))}
        try:
            while pending:
                _check_time(deadline, staging)
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


def _check_time(deadline: float, staging: Path) -> None:
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
    return _run(_shared.tasks[number], _shared.staging, _shared.progress.add)


def _run(task: FileTask, staging: Path, report) -> Outcome:
    target = staging / task.path
    temporary = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _Output(temporary) as out:
            outcome = _Writer(task, out, report).write()
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


class _Writer:
    """Writes one task's file front to back."""

    def __init__(self, task: FileTask, out: _Output, report: Callable[[int], None]) -> None:
        self.task, self.out, self.report = task, out, report
        self.unreported = 0
        self.outcome = Outcome(task.path, task.nbytes)
        self.files: dict[str, int] = {}
        self.buffer = memoryview(bytearray(BUFFER_BYTES))
        self.twin_buffer = memoryview(bytearray(BUFFER_BYTES))

    def write(self) -> Outcome:
        try:
            frames.write(self.task.segments, self._fill, self.out)
        finally:
            for descriptor in self.files.values():
                os.close(descriptor)
            self.report(self.unreported)
        return self.outcome

    def _fill(self, hole: frames.Hole) -> Iterator[memoryview]:
        """The bytes [start, start + nbytes) of an output tensor, streamed from the copies that make it up."""
        spec, position, end = self.task.specs[hole.tensor], 0, hole.start + hole.nbytes
        itemsize = ITEMSIZE[spec.dtype]
        for copy in self.task.copies[hole.tensor]:
            low, high = max(hole.start, position), min(end, position + copy.numel * itemsize)
            if low < high:
                yield from self._stream(copy, (low - position) // itemsize, (high - position) // itemsize, spec)
            position += copy.numel * itemsize

    def _stream(self, copy: Copy, start: int, stop: int, spec: TensorSpec) -> Iterator[memoryview]:
        step = BUFFER_BYTES // max(ITEMSIZE[copy.dtype], ITEMSIZE[spec.dtype])
        for low, high in _chunks(start, stop, step, copy.blocks[0][1].cols if copy.blocks else 1):
            data = self._read(copy.file, copy.offset + low * ITEMSIZE[copy.dtype],
                              (high - low) * ITEMSIZE[copy.dtype], self.buffer, spec.name)
            if copy.blocks:
                self._observe(copy, low, high, data)
            if copy.dtype != spec.dtype:
                data = memoryview(cast(np.frombuffer(data, bits_dtype(copy.dtype)), copy.dtype, spec.dtype)).cast("B")
            yield data
            self._progress(len(data))

    def _progress(self, nbytes: int) -> None:
        self.unreported += nbytes
        if self.unreported >= REPORT_BYTES:
            self.report(self.unreported)
            self.unreported = 0

    def _read(self, path: str, offset: int, nbytes: int, buffer: memoryview, name: str) -> memoryview:
        """The bytes [offset, offset + nbytes) of a file, in `buffer`; zeros where there is no file."""
        if not path:
            return memoryview(bytes(nbytes))
        descriptor = self.files.get(path)
        if descriptor is None:
            descriptor = self.files[path] = os.open(path, os.O_RDONLY)
        view, got = buffer[:nbytes], 0
        while got < nbytes:
            count = os.preadv(descriptor, [view[got:]], offset + got)
            if count == 0:
                raise TaskError(f"{path}: ends before the last byte of {name}; it was cut since the plan was made")
            got += count
        return view

    def _observe(self, copy: Copy, low: int, high: int, data: memoryview) -> None:
        """Digest and compare the elements [low, high) of a copy, block by block."""
        bits, start = np.frombuffer(data, bits_dtype(copy.dtype)), 0
        for tensor, whole in copy.blocks:
            first, last = max(low, start), min(high, start + whole.numel)
            for box, position in whole.split_flat(first - start, last - start):
                element = start + position
                part = bits[element - low:element - low + box.numel]
                if copy.counted:
                    key = tensor, copy.replica
                    digest, count = self.outcome.digests.get(key, (0, 0))
                    self.outcome.digests[key] = (digest + box_digest(part, box)) & MASK, count + box.numel
                if copy.twin is not None:
                    self._compare(copy.twin, tensor, element, part, box)
            start += whole.numel

    def _compare(self, twin: Twin, tensor: Tensor, element: int, main: np.ndarray, box: Box) -> None:
        itemsize = ITEMSIZE[twin.dtype]
        data = self._read(twin.file, twin.offset + element * itemsize, box.numel * itemsize, self.twin_buffer, tensor.name)
        misfit = compare(tensor, main, box, np.frombuffer(data, bits_dtype(twin.dtype)), twin.dtype)
        if misfit is not None:
            known = self.outcome.misfits.setdefault(tensor, misfit)
            if known is not misfit:
                known.merge(misfit)


def _chunks(start: int, stop: int, step: int, cols: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in runs of at most `step` elements that end at the end of a row, where a row fits."""
    while start < stop:
        high = start + step
        whole_rows = high - high % cols
        high = min(whole_rows if whole_rows > start else high, stop)
        yield start, high
        start = high
