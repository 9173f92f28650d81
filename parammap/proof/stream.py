"""Reading logical tensors in bands of fixed size: never a whole tensor, each byte once."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from parammap.errors import TaskError
from parammap.execute.gather import Files, Memory, array_of
from parammap.tensors.arrays import Array
from parammap.tensors.logical import LogicalTensor
from parammap.tensors.region import Cells, Region, cells_of, whole
from parammap.tensors.shard import Shard, fitted
from parammap.tensors.view import View, row_major

BAND_BYTES = 256 << 10
#: a square tile, in which the rows of what lies transposed are long enough to be read one by one
TILE_BYTES = 4 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


def bands(region: Region, itemsize: int) -> Iterator[Region]:
    """The region in bands that follow each other row-major: whole rows of it, or parts of one row
    that is too long."""
    limit, (rows, cols) = max(BAND_BYTES // itemsize, 1), region.sizes
    return _cut(region, max(limit // cols, 1) if rows and cols else 1, min(cols, limit))


def tiles(region: Region, itemsize: int) -> Iterator[Region]:
    """The region in tiles as square as it allows, which are read in few runs whether they lie
    transposed or not."""
    limit, (rows, cols) = TILE_BYTES // itemsize, region.sizes
    wide = min(cols, max(math.isqrt(limit), limit // rows))
    return _cut(region, min(rows, limit // wide), wide)


def _cut(region: Region, rows: int, cols: int) -> Iterator[Region]:
    (row, col), (row_end, col_end) = region.offsets, region.ends
    for first in range(row, row_end, rows):
        for left in range(col, col_end, cols):
            yield Region((first, left), (min(rows, row_end - first), min(cols, col_end - left)))


def read_views(
    views: Sequence[View], region: Region, files: Files
) -> Iterator[tuple[Cells, list[Array]]]:
    """What views of equal shape hold of a region, all in the order in which the first one's
    elements lie, piece by piece: which cells each is, and the bits of each view; these hold until
    the next piece."""
    first, cells, memories = views[0], cells_of(region, views[0].shape), [Memory() for _ in views]
    for piece in whole(first.shape).pieces(first.order, max(BAND_BYTES // first.itemsize, 1)):
        parts = [view.narrow(piece) for view in views]
        yield (
            cells.narrow(piece),
            [
                files.bits(part, parts[0], memory)
                for part, memory in zip(parts, memories, strict=True)
            ],
        )


class Copy:
    """One copy of a logical tensor: of each region, the shard that the `number`-th of its replicas
    keeps."""

    def __init__(
        self, tensor: LogicalTensor, regions: dict[Region, list[Shard]], number: int = 0
    ) -> None:
        self.tensor = tensor
        self.shards = sorted(
            (replica(shards, number) for shards in regions.values()),
            key=lambda shard: shard.region.offsets,
        )
        self._rows = [shard.region.offsets[0] for shard in self.shards]
        self._tallest = max(shard.region.sizes[0] for shard in self.shards)
        self.is_transposed = any(
            shard.view.innermost not in (None, len(shard.view.shape) - 1)
            and shard.region.sizes[1] > 1
            for shard in self.shards
        )
        self._memory = Memory()

    def parts(self, band: Region) -> Iterator[tuple[View, View]]:
        """The views of files that hold elements of `band`, each with where those are in the band,
        row-major."""
        first, end = (
            bisect_left(self._rows, row)
            for row in (band.offsets[0] - self._tallest + 1, band.ends[0])
        )
        whole_band = Shard(self.tensor, band, row_major(band.sizes, self.tensor.dtype))
        for shard in self.shards[first:end]:
            if part := shard.region.intersect(band):
                yield from ((its, there) for _, (its, there) in fitted(part, (shard, whole_band)))

    def read(self, band: Region, files: Files) -> Array:
        """The bits of a region of the tensor, row-major; shape [elements], until the next read."""
        place = row_major((band.numel,), self.tensor.dtype)
        buffer = self._memory.of(place.span)
        for view, there in self.parts(band):
            files.read(view, buffer, there)
        return array_of(buffer, place)

    def place(self, row: int, col: int) -> tuple[str, int]:
        """The file and byte offset of an element."""
        view, _ = next(self.parts(Region((row, col), (1, 1))))
        return view.file, view.offset


def replica(shards: Sequence[Shard], number: int) -> Shard:
    """The `number`-th copy of a region; where there are fewer, they are counted round and round.

    Replicas are numbered ep · tp + tp, so the copies that more expert ranks keep go with the first
    ones' again."""
    return sorted(shards, key=lambda shard: shard.replica)[number % len(shards)]


def copies_of(regions: dict[Region, list[Shard]]) -> int:
    """How many copies of some part of a tensor are kept."""
    return max(map(len, regions.values()))


#: what worker processes inherit
_work: Callable[[Any], Any]


def in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[Result]:
    """work(item) of each item, in their order, by `workers` processes that inherit `work` and never
    pickle it."""
    if workers == 1 or len(items) < 2:
        yield from map(work, items)
        return
    global _work
    _work = work
    try:
        with ProcessPoolExecutor(min(workers, len(items)), get_context("fork")) as pool:
            yield from pool.map(_call, items)
    except BrokenProcessPool as error:
        raise TaskError("a worker process was killed, perhaps for want of memory") from error
    finally:
        del _work


def _call(item: Any) -> Any:
    return _work(item)
