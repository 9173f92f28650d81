"""Shards: regions of logical tensors, and the views of what holds them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import floordiv, mul

from parammap.tensors.logical import LogicalTensor, Stored
from parammap.tensors.region import Region, whole
from parammap.tensors.view import View, row_major


@dataclass(frozen=True, slots=True)
class Shard:
    """A region of a logical tensor, and where its elements lie. No tensor: a gap, of zeros.

    The last axis of the view is along the region's columns, all others together are along its rows:
    a shape of (8, 64, 1024) are 8 · 64 rows of 1024 columns, of which each 64 (the rows of a group
    of heads) lie together. `replica` tells apart the copies that several ranks keep of the same
    region."""

    tensor: LogicalTensor | None
    region: Region
    view: View
    replica: int = 0

    @property
    def periods(self) -> list[int]:
        """For each axis of rows, how many rows lie between two neighbours along it."""
        periods, rows = [], 1
        for size in reversed(self.view.shape[:-1]):
            periods.append(rows)
            rows *= size
        return periods[::-1]

    def cut(self, box: Region) -> Shard:
        """The shard of a box of its view that begins and ends at whole rows, or in one row, of each
        outer axis."""
        row, col = self.region.offsets
        row += sum(map(mul, box.offsets[:-1], self.periods))
        region = Region((row, col + box.offsets[-1]), (math.prod(box.sizes[:-1]), box.sizes[-1]))
        return Shard(self.tensor, region, merged(self.view.narrow(box)), self.replica)

    def within(self, low: int, high: int) -> Iterator[Shard]:
        """What of it lies at bytes [low, high)."""
        if self.region.numel:
            yield from map(self.cut, self.view.within(low, high))

    def strip(self, wide: int, low: int, high: int) -> Iterator[Shard]:
        """What of it lies at bytes [low, high) of each `wide` bytes of a tensor, as parts of the
        tensor that has these alone, one after the other."""
        view, narrow = self.view, high - low
        if not narrow:
            return
        inner = [axis for axis, stride in enumerate(view.strides) if stride < wide]
        line = View(
            "",
            view.offset % wide,
            view.dtype,
            tuple(view.shape[axis] for axis in inner),
            tuple(view.strides[axis] for axis in inner),
        )
        rows = {axis in inner for axis, size in enumerate(view.shape[:-1]) if size > 1}
        if line.offset + line.span > wide or len(rows) > 1:
            for start in range(view.offset // wide * wide, view.offset + view.span, wide):
                for part in self.within(start, start + wide):
                    yield from part.strip(wide, low, high)
            return
        strides = tuple(s // wide * narrow + s % wide for s in view.strides)
        for there in line.within(low, high):
            box = whole(view.shape)
            for axis, offset, size in zip(inner, there.offsets, there.sizes, strict=True):
                box = box.narrow(axis, offset, offset + size)
            kept, cut = view.narrow(box), self.cut(box)
            offset = kept.offset // wide * narrow + kept.offset % wide - low
            yield replace(cut, view=merged(kept._replace(offset=offset, strides=strides)))

    def at(self, file: str, offset: int) -> Shard:
        """The same shard of a tensor whose first byte lies at `offset` of `file`."""
        return Shard(self.tensor, self.region, self.view.at(file, offset), self.replica)

    def place_of(self, row: int, col: int) -> int:
        """The byte of the file where the tensor's element [row, col] begins."""
        return self._view(row, 1, col, 1, (1,)).offset

    def _view(self, row: int, rows: int, col: int, cols: int, periods: Sequence[int]) -> View:
        """The view of a region inside its own, as axes of rows with these periods; see `fitted` for
        which there are."""
        own = list(zip(self.periods, self.view.strides[:-1], strict=True))
        first_row, first_col = self.region.offsets
        offset, left = self.view.offset + (col - first_col) * self.view.strides[-1], row - first_row
        for period, stride in own:
            offset += left // period * stride
            left %= period
        strides = []
        for step in periods:
            period, stride = next(one for one in own if one[0] <= step)
            strides.append(step // period * stride)
        shape = tuple(map(floordiv, (rows, *periods), periods))
        return View(
            self.view.file,
            offset,
            self.view.dtype,
            (*shape, cols),
            (*strides, self.view.strides[-1]),
        )


def merged(view: View) -> View:
    """The same view with as few axes of rows as it can have."""
    if len(view.shape) == 2:
        return view
    *rows, col = range(len(view.shape))
    kept: list[tuple[int, int]] = []
    for axis in rows:
        size, stride = view.shape[axis], view.strides[axis]
        if kept and kept[-1][1] == size * stride:
            kept[-1] = kept[-1][0] * size, stride
        elif size > 1 or not kept:
            if kept and kept[0][0] == 1:
                kept.pop()
            kept.append((size, stride))
    if len(kept) == len(rows):
        return view
    return view._replace(
        shape=(*(size for size, _ in kept), view.shape[col]),
        strides=(*(stride for _, stride in kept), view.strides[col]),
    )


def whole_of(tensor: LogicalTensor, region: Region | None = None) -> Shard:
    """A logical tensor, or a region of it, row-major."""
    region = region or Region((0, 0), tensor.matrix)
    return Shard(tensor, region, row_major(region.sizes, tensor.dtype))


def transposed(shards: Iterable[Shard], shape: tuple[int, ...]) -> tuple[Shard, ...]:
    """The shards of a matrix of this shape as those of the matrix that is its transpose, both
    row-major."""
    rows, cols = shape
    return tuple(
        replace(
            shard,
            view=shard.view.restrided(cols, (shard.view.itemsize, rows * shard.view.itemsize)),
        )
        for shard in shards
    )


def fitted(region: Region, shards: Sequence[Shard]) -> Iterator[tuple[Region, list[View]]]:
    """A region that all the shards hold, as views of equal shape of each of them: in as few parts
    as that takes."""
    (row, col), (rows, cols) = region.offsets, region.sizes
    if all(len(shard.view.shape) == 2 for shard in shards):
        yield (
            region,
            [
                shard.view if shard.region == region else shard._view(row, rows, col, cols, (1,))
                for shard in shards
            ],
        )
        return
    for low, high in _runs(row, row + rows, shards):
        periods = sorted(
            {1, *(period for shard in shards for period in shard.periods if period < high - low)},
            reverse=True,
        )
        yield (
            Region((low, col), (high - low, cols)),
            [shard._view(low, high - low, col, cols, periods) for shard in shards],
        )


def _runs(low: int, high: int, shards: Sequence[Shard]) -> Iterator[tuple[int, int]]:
    """The rows [low, high) in runs of which each is, for every axis of rows of every shard, some
    whole rows of it or inside one; and of whose periods each divides the next."""
    for shard in shards:
        for period in shard.periods:
            first = low + (shard.region.offsets[0] - low) % period
            last = high - (high - shard.region.offsets[0]) % period
            cuts = [edge for edge in (first, last) if low < edge < high]
            if cuts and period > 1:
                yield from _runs(low, cuts[0], shards)
                yield from _runs(cuts[0], high, shards)
                return
    periods = sorted(
        {period for shard in shards for period in shard.periods if period < high - low}
    )
    if all(wide % narrow == 0 for narrow, wide in pairwise(periods)):
        yield low, high
    else:
        for start in range(low, high, periods[-1]):
            yield from _runs(start, start + periods[-1], shards)


def refined(regions: dict[Region, list[Shard]]) -> dict[Region, list[Shard]]:
    """The same shards, cut where any of them ends: copies that files cut differently come to have
    equal regions."""
    refined: dict[Region, list[Shard]] = {}
    shards = [shard for shards in regions.values() for shard in shards]
    rows = sorted({edge for region in regions for edge in (region.offsets[0], region.ends[0])})
    for low, high in pairwise(rows):
        there = [
            shard
            for shard in shards
            if shard.region.offsets[0] < high and low < shard.region.ends[0]
        ]
        cols = sorted(
            {edge for shard in there for edge in (shard.region.offsets[1], shard.region.ends[1])}
        )
        for left, right in pairwise(cols):
            cell = Region((low, left), (high - low, right - left))
            holding = [shard for shard in there if shard.region.intersect(cell)]
            for part, views in fitted(cell, holding):
                refined[part] = [
                    Shard(shard.tensor, part, merged(view), shard.replica)
                    for shard, view in zip(holding, views, strict=True)
                ]
    return refined


def views_of(stored: Stored) -> Iterator[tuple[View, View]]:
    """A tensor as it lies in its files: views of those, each with which elements of the tensor,
    row-major, it is."""
    if stored.strides:
        (extent,) = stored.extents
        place = row_major(stored.shape, stored.dtype)
        strides = tuple(stride * place.itemsize for stride in stored.strides)
        yield View(extent.file, extent.offset, stored.dtype, stored.shape, strides), place
        return
    flat, begin = row_major((stored.numel,), stored.dtype), 0
    for extent in stored.extents:
        for place in map(flat.narrow, flat.within(begin, begin + extent.nbytes)):
            yield place.at(extent.file, extent.offset - begin), place
        begin += extent.nbytes


def lying(shard: Shard, stored: Stored, is_transposed: bool, replica: int) -> Iterator[Shard]:
    """Where a shard of a tensor, row-major in its logical orientation, lies in the files that hold
    the tensor."""
    shard = Shard(shard.tensor, shard.region, shard.view, replica)
    if is_transposed or stored.strides:
        strides = stored.strides or (stored.shape[1], 1)
        rows, cols = strides[::-1] if is_transposed else strides
        width, itemsize = stored.shape[not is_transposed], shard.view.itemsize
        shard = replace(shard, view=shard.view.restrided(width, (rows * itemsize, cols * itemsize)))
    if len(stored.extents) == 1 and stored.is_whole and shard.region.numel:
        yield shard.at(stored.extents[0].file, stored.extents[0].offset)
        return
    begin, low, high = 0, shard.view.offset, shard.view.offset + shard.view.span
    for extent in stored.extents:
        end = begin + extent.nbytes
        if begin < high and low < end:
            for part in shard.within(begin, end):
                yield part.at(extent.file, extent.offset - begin)
        begin = end
