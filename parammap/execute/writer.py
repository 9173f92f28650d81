"""Writing one output file: tensor by tensor, tile by tile, gathered from the source, hashed and
checked on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from parammap.errors import TaskError
from parammap.execute.checks import (
    Found,
    Misfit,
    NonFinite,
    Overflown,
    Unequal,
    cast,
    compare,
    mean_bits,
    non_finite,
    overflown,
    unequal,
)
from parammap.execute.gather import BUFFER_BYTES, Memory, Reader, array_of
from parammap.execute.source_checksums import Runs, RunsRead
from parammap.formats import frames
from parammap.plan.plan import FileTask, Fill, panels
from parammap.tensors.arrays import Array
from parammap.tensors.digest import MASK, cells_digest
from parammap.tensors.logical import ITEMSIZE, LogicalTensor
from parammap.tensors.region import Cells, Region, cells_of

REPORT_BYTES = 8 << 20
#: what is held of a tensor whose elements lie in another order than they are read: the larger, the
#: longer the runs read
STRIP_BYTES = 16 << 20


@dataclass(slots=True)
class Outcome:
    """What a task found out: per (tensor, replica) the digest and the number of its elements, as
    they are and as a cast made them; misfits; replicas that differ; what is not finite or became
    so; bytes written, and their CRC-32; the runs that were read of files with checksums."""

    path: str
    nbytes: int
    crc32: int = 0
    runs: Runs = field(default_factory=dict)
    digests: dict[tuple[LogicalTensor, int], tuple[int, int]] = field(default_factory=dict)
    misfits: dict[LogicalTensor, Misfit] = field(default_factory=dict)
    unequal: dict[LogicalTensor, Unequal] = field(default_factory=dict)
    non_finite: dict[LogicalTensor, NonFinite] = field(default_factory=dict)
    overflown: dict[LogicalTensor, Overflown] = field(default_factory=dict)


@lru_cache(maxsize=64)
def _as(tensor: LogicalTensor, dtype: str) -> LogicalTensor:
    return replace(tensor, dtype=dtype)


class _Known(NamedTuple):
    """Which cells of which logical tensor some elements are, and the file that they are read
    from."""

    tensor: LogicalTensor
    cells: Cells
    file: str

    def narrow(self, box: Region) -> _Known:
        """Those that a box of the array of them holds."""
        return _Known(self.tensor, self.cells.narrow(box), self.file)


class _Filling:
    """A fill, what is known of its elements (of a row that is repeated, always the same cells), and
    the axes along which it is taken apart where something that is read lies in another order."""

    def __init__(self, fill: Fill) -> None:
        self.fill = fill
        self.known: _Known | None = None
        self.axes: Sequence[int] = next(
            (
                view.order
                for view in fill.reads
                if view.innermost not in (None, fill.target.innermost)
            ),
            (),
        )
        if fill.tensor and fill.region and fill.source:
            cells = cells_of(fill.region, fill.target.shape)
            if 0 in fill.source.strides:
                cells = cells._replace(steps=(0,) * len(cells.steps))
            self.known = _Known(fill.tensor, cells, fill.source.file)


@dataclass(frozen=True, slots=True)
class _Panel:
    """Bytes [start, stop) of a tensor, which some fills make up whose elements alternate there;
    written `step` bytes at a time, or up to where such a tile ends."""

    start: int
    stop: int
    step: int
    fills: tuple[_Filling, ...]

    def tiles(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """What of the bytes [low, high) is in the panel, tile by tile."""
        low, high = max(low, self.start), min(high, self.stop)
        while low < high:
            end = min(self.start + ((low - self.start) // self.step + 1) * self.step, high)
            yield low, end
            low = end


class Writer:
    """Writes one task's file front to back."""

    def __init__(self, task: FileTask, out: frames.Sink, report: Callable[[int], None]) -> None:
        self.task, self.out, self.report = task, out, report
        self.unreported = 0
        self.outcome = Outcome(task.path, task.nbytes)
        #: the tensor that is being written, its panels, and its name for errors
        self.tensor, self.dtype = -1, ""
        self.panels: list[_Panel] = []
        self.runs = RunsRead()
        self.reader = Reader(self._cut, self.runs)
        self.tile, self.uncast, self.repeated = (Memory() for _ in range(3))

    def write(self) -> Outcome:
        with self.reader:
            self.outcome.crc32 = frames.write(self.task.segments, self._fill, self.out)
        self.outcome.runs = self.runs.taken()
        self.report(self.unreported)
        return self.outcome

    def _cut(self, file: str, _offset: int) -> TaskError:
        name = self.task.specs[self.tensor].name
        return TaskError(
            f"{file}: ends before the last byte of {name}; it was cut since the plan was made"
        )

    def _fill(self, hole: frames.Hole) -> Iterator[memoryview]:
        """The bytes [start, start + nbytes) of an output tensor."""
        if self.tensor != hole.tensor:
            self.tensor, self.dtype = hole.tensor, self.task.specs[hole.tensor].dtype
            self.panels = list(_panels(self.task.fills[hole.tensor], self.dtype))
        for panel in self.panels:
            for low, high in panel.tiles(hole.start, hole.start + hole.nbytes):
                tile = self.tile.of(high - low)
                for filling in panel.fills:
                    for box in filling.fill.target.within(low, high):
                        self._gather(filling, box, tile, low)
                for start in range(0, len(tile), BUFFER_BYTES):
                    yield tile[start : start + BUFFER_BYTES]
                self._progress(len(tile))

    def _progress(self, nbytes: int) -> None:
        self.unreported += nbytes
        if self.unreported >= REPORT_BYTES:
            self.report(self.unreported)
            self.unreported = 0

    # ----------------------------------------------------------------------------------------------------------
    # gathering

    def _gather(self, filling: _Filling, box: Region, tile: memoryview, low: int) -> None:
        """Fill a box of a fill's target, in a tile that begins at byte `low` of the tensor."""
        fill = filling.fill
        if fill.source is None:
            array_of(tile, fill.target.narrow(box).at("", -low))[...] = 0
            return
        for piece in (
            box.pieces(filling.axes, BUFFER_BYTES // fill.source.itemsize)
            if filling.axes
            else (box,)
        ):
            target, source = fill.target.narrow(piece).at("", -low), fill.source.narrow(piece)
            known = filling.known and filling.known.narrow(piece)
            if source.dtype == self.dtype:
                self.reader.read(source, tile, target)
                if known:
                    self._observe(fill, piece, known, array_of(tile, target))
                continue
            bits = self.reader.bits(source, target, self.uncast)
            if known:
                self._observe(fill, piece, known, bits)
            made = cast(bits, source.dtype, self.dtype)
            array_of(tile, target)[...] = made
            if known and fill.counted:
                self._digest(_as(known.tensor, self.dtype), fill, known.cells, made)

    # -----------------------------------------------------------------------------------------------------
    # what is checked

    def _observe(self, fill: Fill, piece: Region, known: _Known, bits: Array) -> None:
        """Compare and digest a piece of what was read; `bits` become the mean of the replicas,
        where that is wanted."""
        (tensor, cells, file), outcome, target = known, self.outcome, fill.target
        if fill.model_copy:
            model = self.reader.bits(fill.model_copy.narrow(piece), target, self.repeated)
            _take(outcome.misfits, compare(tensor, bits, cells, model, fill.model_copy.dtype))
        if fill.others:
            first = bits.copy() if fill.mean else bits
            others = []
            for other in fill.others:
                there = self.reader.bits(other.narrow(piece), target, self.repeated)
                _take(outcome.unequal, unequal(tensor, cells, first, there, other.file))
                others.append(there.copy() if fill.mean else there)
            if fill.mean:
                np.copyto(bits, mean_bits([first, *others], tensor.dtype))
        if fill.counted:
            _take(outcome.non_finite, non_finite(tensor, cells, bits, file))
            self._digest(tensor, fill, cells, bits)
        if self.dtype == "float16" != tensor.dtype:
            _take(outcome.overflown, overflown(tensor, cells, bits, file))

    def _digest(self, tensor: LogicalTensor, fill: Fill, cells: Cells, bits: Array) -> None:
        """Add the digest of what was read of a tensor, or of what that is written as."""
        digest, count = self.outcome.digests.get((tensor, fill.replica), (0, 0))
        self.outcome.digests[tensor, fill.replica] = (
            digest + cells_digest(bits, cells) & MASK,
            count + bits.size,
        )


def _take(known: dict[LogicalTensor, Found], found: Found | None) -> None:
    """Add what was found to what is known."""
    if found and known.setdefault(found.tensor, found) is not found:
        known[found.tensor].merge(found)


def _panels(fills: tuple[Fill, ...], dtype: str) -> Iterator[_Panel]:
    for start, stop, there in panels(fills):
        fillings = tuple(map(_Filling, there))
        yield _Panel(start, stop, _step(fillings, dtype), fillings)


def _step(fillings: tuple[_Filling, ...], dtype: str) -> int:
    """The bytes of a tile: a buffer, or a strip where orders differ; whole rows of it, the widest
    that fit."""
    targets = [filling.fill.target for filling in fillings]
    widest = max(
        view.itemsize
        for filling in fillings
        for view in (filling.fill.target, *filling.fill.reads[:1])
    )
    room = STRIP_BYTES if any(filling.axes for filling in fillings) else BUFFER_BYTES
    limit = max(room // widest, 1) * ITEMSIZE[dtype]
    row = max(
        (
            stride
            for target in targets
            for size, stride in zip(target.shape, target.strides, strict=True)
            if size > 1 and stride <= limit
        ),
        default=ITEMSIZE[dtype],
    )
    return limit // row * row
