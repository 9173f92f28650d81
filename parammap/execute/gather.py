"""Gathering: the elements of a view of a file, read into any other view of a buffer. Never by mmap,
no byte twice."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Self

import numpy as np

from parammap.errors import RefusedError
from parammap.execute.source_checksums import RunsRead
from parammap.formats import regular_file
from parammap.tensors.arrays import Array
from parammap.tensors.digest import bits_dtype
from parammap.tensors.view import View, row_major

#: what is read at a time where elements have to be put in another order
BUFFER_BYTES = 256 << 10
#: runs that lie further apart than this are read one by one, others with what is between them
GAP_BYTES = 16 << 10
_OPEN_FILES = 256

#: (size, stride in the file, stride in the buffer), in bytes
_Axis = tuple[int, int, int]


class Memory:
    """Memory that is used again, and grows as it has to."""

    def __init__(self) -> None:
        self._bytes = memoryview(b"")

    def of(self, nbytes: int) -> memoryview:
        if nbytes > len(self._bytes):
            self._bytes = memoryview(bytearray(nbytes))
        return self._bytes[:nbytes]


class Reader:
    """Reads views of files, which stay open while it does; those unused for longest are closed.

    `cut` makes the error to be raised where a file (named) ends (at which byte) before a view does.
    `runs` takes in what is read, so that it can be held to the checksums of the files.
    """

    def __init__(self, cut: Callable[[str, int], Exception], runs: RunsRead | None = None) -> None:
        self.cut, self.runs = cut, runs
        self.scratch = memoryview(bytearray(BUFFER_BYTES))
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, source: View, buffer: memoryview, target: View) -> None:
        """Fill `target` of the buffer, of which it is a view, with `source`; both have the same
        shape and dtype."""
        if (
            source.strides == target.strides
            and (nbytes := source.span) == source.numel * source.itemsize
        ):
            self._pread(source.file, source.offset, buffer[target.offset : target.offset + nbytes])
            return
        axes = zip(source.shape, source.strides, target.strides, strict=True)
        joined = _joined([axis for axis in axes if axis[0] > 1 and axis[1]])
        self._gather(
            source,
            source.offset,
            joined or [(1, source.itemsize, source.itemsize)],
            buffer,
            target.offset,
        )
        if 0 in source.strides:
            every = array_of(buffer, target)
            np.copyto(
                every,
                every[tuple(slice(None) if stride else slice(1) for stride in source.strides)],
            )

    def bits(self, source: View, like: View | None = None, memory: Memory | None = None) -> Array:
        """The bits of a view, in an array in whose memory they lie as those of `like` do
        (row-major, if it is None)."""
        place = source.packed(like) if like else row_major(source.shape, source.dtype)
        buffer = (memory or Memory()).of(source.numel * source.itemsize)
        self.read(source, buffer, place)
        return array_of(buffer, place)

    def _gather(
        self, source: View, offset: int, axes: list[_Axis], buffer: memoryview, at: int
    ) -> None:
        """Read the elements of these axes, from a byte of the source's file on, into those at byte
        `at` of the buffer."""
        (size, stride, there), *inner = axes
        file, itemsize = source.file, source.itemsize
        if not inner and stride == there == itemsize:
            self._pread(file, offset, buffer[at : at + size * itemsize])
            return
        width = sum((count - 1) * step for count, step, _ in inner) + itemsize
        is_run = len(inner) == 1 and inner[0][1:] == (itemsize, itemsize)
        far = stride - width > GAP_BYTES
        if width > len(self.scratch) or (is_run and far):
            for number in range(size):
                self._gather(source, offset + number * stride, inner, buffer, at + number * there)
            return
        count = len(self.scratch) // width if far else (len(self.scratch) - width) // stride + 1
        dtype = bits_dtype(source.dtype)
        shape, steps, theirs = zip(*inner, strict=True) if inner else ((), (), ())
        for first in range(0, size, count):
            rows = min(count, size - first)
            if far:
                for number in range(rows):
                    self._pread(
                        file,
                        offset + (first + number) * stride,
                        self.scratch[number * width : (number + 1) * width],
                    )
            else:
                self._pread(
                    file, offset + first * stride, self.scratch[: (rows - 1) * stride + width]
                )
            np.copyto(
                np.ndarray((rows, *shape), dtype, buffer, at + first * there, (there, *theirs)),
                np.ndarray(
                    (rows, *shape), dtype, self.scratch, 0, (width if far else stride, *steps)
                ),
            )

    def _pread(self, file: str, offset: int, into: memoryview) -> None:
        descriptor, got = self._descriptor(file), 0
        try:
            while got < len(into):
                count = os.preadv(descriptor, [into[got:]], offset + got)
                if count == 0:
                    raise self.cut(file, offset + got)
                got += count
        except OSError as error:
            error.filename = file
            raise
        if self.runs:
            self.runs.add(file, offset, into)

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            if len(self._descriptors) >= _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            descriptor = self._descriptors[file] = self._open(file)
            if self.runs:
                self.runs.open(file, descriptor)
        self._descriptors.move_to_end(file)
        return self._descriptors[file]

    def _open(self, file: str) -> int:
        return os.open(file, os.O_RDONLY)


class Files(Reader):
    """Reads files that are to be proved."""

    def __init__(self) -> None:
        super().__init__(
            lambda file, offset: RefusedError(
                f"{file}: ends at byte {offset}, inside a tensor; it was cut while being read"
            )
        )

    def _open(self, file: str) -> int:
        return regular_file.descriptor_of(file)


def array_of(buffer: memoryview, view: View) -> Array:
    """The bits of a view of a buffer, as an array that shares its memory."""
    return np.ndarray(view.shape, bits_dtype(view.dtype), buffer, view.offset, view.strides)


def _joined(axes: list[_Axis]) -> list[_Axis]:
    """The axes, the widest stride in the file first; neighbours that go on in each other at both
    ends made one."""
    result: list[_Axis] = []
    for size, stride, there in sorted(axes, key=lambda axis: -axis[1]):
        if result and result[-1][1:] == (size * stride, size * there):
            result[-1] = result[-1][0] * size, stride, there
        else:
            result.append((size, stride, there))
    return result
