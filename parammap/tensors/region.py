"""Boxes of tensors: interval arithmetic on small values. Nothing here knows a file, a dtype or a
framework."""

from __future__ import annotations

import math
from collections.abc import Collection
from operator import add, mul, sub
from typing import NamedTuple

import numpy as np

from parammap.tensors.arrays import Array


class Region(NamedTuple):
    """A box of a tensor: the element that it begins at and its size, axis by axis.

    Regions of logical tensors have two axes, the rows and the columns of its matrix (see
    logical.LogicalTensor)."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(map(add, self.offsets, self.sizes))

    def intersect(self, other: Region) -> Region | None:
        """The elements of both; None if there are none."""
        if self == other:
            return self
        offsets = tuple(map(max, self.offsets, other.offsets))
        sizes = tuple(map(sub, map(min, self.ends, other.ends), offsets))
        return Region(offsets, sizes) if min(sizes, default=1) > 0 else None

    def narrow(self, axis: int, start: int, stop: int) -> Region:
        """The elements whose index along `axis`, counted from the region's own begin, is in [start,
        stop)."""
        return Region(
            (*self.offsets[:axis], self.offsets[axis] + start, *self.offsets[axis + 1 :]),
            (*self.sizes[:axis], stop - start, *self.sizes[axis + 1 :]),
        )

    def pieces(self, axes: Collection[int], limit: int) -> list[Region]:
        """The region in pieces of at most `limit` elements (at least 1): cut along the first of the
        axes, then the next."""
        if self.numel <= limit or not axes:
            return [self]
        first, *rest = axes
        count = max(self.sizes[first] * limit // self.numel, 1)
        return [
            piece
            for start in range(0, self.sizes[first], count)
            for piece in self.narrow(first, start, min(start + count, self.sizes[first])).pieces(
                rest, limit
            )
        ]


def whole(shape: tuple[int, ...]) -> Region:
    """All of a tensor."""
    return Region((0,) * len(shape), shape)


def covers_once(regions: list[Region], shape: tuple[int, int]) -> bool:
    """Whether the regions tile a matrix, with no gap and no overlap."""
    if len(regions) == 1:
        return regions[0] == whole(shape)
    if sum(region.numel for region in regions) != math.prod(shape):
        return False
    counts = _counts(regions, shape)
    return counts is not None and bool((counts == 1).all())


def covers(regions: list[Region], shape: tuple[int, int]) -> bool:
    """Whether the regions, which may overlap, leave no element of a matrix out."""
    if whole(shape) in regions:
        return True
    counts = _counts(regions, shape)
    return counts is not None and bool(counts.all())


def _counts(regions: list[Region], shape: tuple[int, int]) -> Array | None:
    """How many regions hold each cell of the grid that all their edges make; None if some region
    reaches outside."""
    corners = list(zip(*(there for r in regions for there in (r.offsets, r.ends)), strict=True))
    edges = [sorted({0, size}.union(*corners[axis : axis + 1])) for axis, size in enumerate(shape)]
    if any(there[-1] > size for there, size in zip(edges, shape, strict=True)):
        return None
    row_at, col_at = ({edge: number for number, edge in enumerate(there)} for there in edges)
    count = np.zeros([len(there) - 1 for there in edges], np.int32)
    for region in regions:
        (row, col), (row_end, col_end) = region.offsets, region.ends
        count[row_at[row] : row_at[row_end], col_at[col] : col_at[col_end]] += 1
    return count


class Cells(NamedTuple):
    """Which elements of a logical tensor's matrix an array holds: its element [i, j, …, k] is the
    one at row `row` + i·steps[0] + j·steps[1] + …, column `col` + k."""

    row: int
    col: int
    steps: tuple[int, ...]

    def narrow(self, box: Region) -> Cells:
        """Those that a box of the array holds."""
        if not any(box.offsets):
            return self
        row = self.row + sum(map(mul, box.offsets[:-1], self.steps))
        return Cells(row, self.col + box.offsets[-1], self.steps)

    def position(self, element: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """The row and column of an element of the array, which has this shape and is counted
        row-major."""
        *rows, col = (int(index) for index in np.unravel_index(element, shape))
        return self.row + sum(
            index * step for index, step in zip(rows, self.steps, strict=True)
        ), self.col + col


def cells_of(region: Region, shape: tuple[int, ...]) -> Cells:
    """The cells of an array of this shape that holds a region of a matrix: its last axis the
    columns, the others rows."""
    steps, step = [], 1
    for size in reversed(shape[:-1]):
        steps.append(step)
        step *= size
    row, col = region.offsets
    return Cells(row, col, tuple(reversed(steps)))
