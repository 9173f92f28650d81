"""Views: elements that lie with strides somewhere in a file, or in a tensor or a buffer that is to
be filled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from operator import mul
from typing import NamedTuple

from parammap.tensors.logical import ITEMSIZE
from parammap.tensors.region import Region, whole


class View(NamedTuple):
    """Element [i, j, …] of dtype `dtype` begins at byte offset + i·strides[0] + j·strides[1] + … of
    `file`.

    The file is '' if bytes count from the begin of a tensor or a buffer. A stride of 0 repeats
    elements. No other two elements overlap: the elements of each axis lie within the stride of the
    next wider one."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """The bytes from the first element's begin to the last one's end."""
        behind_last: int = sum(map(mul, self.shape, self.strides))
        return self.itemsize + behind_last - sum(self.strides)

    @property
    def order(self) -> list[int]:
        """The axes of several elements, the widest stride first; repeated ones last."""
        return sorted(
            (axis for axis, size in enumerate(self.shape) if size > 1),
            key=lambda axis: -self.strides[axis],
        )

    @property
    def innermost(self) -> int | None:
        """The axis along which neighbours lie closest; None for a single element."""
        if self.shape[-1] > 1 and self.strides[-1] == self.itemsize:
            return len(self.shape) - 1
        return next((axis for axis in reversed(self.order) if self.strides[axis]), None)

    def packed(self, like: View) -> View:
        """A view of a buffer that has as many elements of this dtype and no gaps, in the order in
        which those of `like`, of the same shape, lie."""
        if sorted(like.strides, reverse=True) == list(like.strides):
            return row_major(self.shape, self.dtype)
        strides, stride = [0] * len(self.shape), self.itemsize
        for axis in sorted(range(len(self.shape)), key=lambda axis: like.strides[axis]):
            strides[axis] = stride
            stride *= self.shape[axis]
        return View("", 0, self.dtype, self.shape, tuple(strides))

    def narrow(self, box: Region) -> View:
        """The elements of a box of it, which counts in its own axes."""
        if box.sizes == self.shape:
            return self
        start = sum(map(mul, box.offsets, self.strides))
        return View(self.file, self.offset + start, self.dtype, box.sizes, self.strides)

    def at(self, file: str, offset: int) -> View:
        """The same view of a tensor whose first byte lies at `offset` of `file`."""
        return View(file, self.offset + offset, self.dtype, self.shape, self.strides)

    def cast(self, dtype: str) -> View:
        """The same elements of a tensor of another dtype; its offset counts from the tensor's first
        byte."""
        if dtype == self.dtype:
            return self
        old, new = self.itemsize, ITEMSIZE[dtype]
        return View(
            self.file,
            self.offset // old * new,
            dtype,
            self.shape,
            tuple(s // old * new for s in self.strides),
        )

    def restrided(
        self, cols: int, strides: tuple[int, int], origin: tuple[int, int] = (0, 0)
    ) -> View:
        """The same elements, by rows and column, of a row-major matrix of `cols` columns whose rows
        and columns are to lie `strides` bytes apart, and whose element `origin` is to be the first.
        The last axis is along the columns."""
        row, col = divmod(self.offset // self.itemsize, cols)
        offset = (row - origin[0]) * strides[0] + (col - origin[1]) * strides[1]
        rows = (stride // (cols * self.itemsize) * strides[0] for stride in self.strides[:-1])
        return self._replace(offset=offset, strides=(*rows, strides[1]))

    def within(self, low: int, high: int) -> Iterator[Region]:
        """The boxes of its elements, in its own axes, that lie at bytes [low, high); at most 2·axes
        − 1, in order."""
        low, high = low - self.offset, high - self.offset
        if low <= 0 and self.span <= high:
            yield whole(self.shape)
        elif high > 0:
            yield from self._within(self.order, low, high, whole(self.shape))

    def _within(self, axes: list[int], low: int, high: int, box: Region) -> Iterator[Region]:
        if not axes:
            if low <= 0 and high >= self.itemsize:
                yield box
            return
        axis, *inner = axes
        size, stride = self.shape[axis], self.strides[axis]
        width = sum((self.shape[one] - 1) * self.strides[one] for one in inner) + self.itemsize
        first = min(max(-(-low // stride), 0), size)  # the first that begins in the range
        end = max(min((high - width) // stride + 1, size), first)  # behind the last that ends in it
        if (
            first > 0 and (first - 1) * stride + width > low
        ):  # it begins before the range, and reaches in
            at = (first - 1) * stride
            yield from self._within(inner, low - at, high - at, box.narrow(axis, first - 1, first))
        if first < end:
            yield box.narrow(axis, first, end)
        if end < size and end * stride < high:  # it begins in the range, and ends behind
            at = end * stride
            yield from self._within(inner, low - at, high - at, box.narrow(axis, end, end + 1))

    def index_at(self, byte: int) -> tuple[int, ...] | None:
        """The index of the element of which `byte` of the file is a part; None if there is none."""
        left, index = byte - self.offset, [0] * len(self.shape)
        for axis in self.order:
            index[axis] = min(max(left // self.strides[axis], 0), self.shape[axis] - 1)
            left -= index[axis] * self.strides[axis]
        return tuple(index) if 0 <= left < self.itemsize else None

    def runs(self) -> Iterator[Region]:
        """The boxes, in order of their bytes, of which each lies in one run of bytes, row-major."""
        (*outer,) = self.order
        nbytes, inside = self.itemsize, len(self.shape)
        while outer and outer[-1] < inside and self.strides[outer[-1]] == nbytes:
            inside = outer.pop()
            nbytes *= self.shape[inside]
        return iter(whole(self.shape).pieces(outer, nbytes // self.itemsize))


def row_major(shape: tuple[int, ...], dtype: str, file: str = "", offset: int = 0) -> View:
    """A view of elements that follow each other, the last axis fastest."""
    strides, stride = [], ITEMSIZE[dtype]
    for size in reversed(shape):
        strides.append(stride)
        stride *= size
    return View(file, offset, dtype, shape, tuple(strides[::-1]))
