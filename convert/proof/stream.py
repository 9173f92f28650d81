"""Reading logical tensors in bands of fixed size: never a whole tensor, never by mmap, each byte once."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

import numpy as np

from ..digest import bits_dtype
from ..errors import RefusedError, TaskError
from ..tensors import ITEMSIZE, Box, Piece, Tensor

BAND_BYTES = 256 << 10
#: a square tile, in which the rows of what lies transposed are long enough to be read one by one
TILE_BYTES = 4 << 20
_OPEN_FILES = 64

Item, Result = TypeVar("Item"), TypeVar("Result")


class Files:
    """Files by name, open while they are read; those unused for longest are closed."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, file: str, offset: int, into: np.ndarray) -> None:
        """Fill `into`, which is contiguous, from byte `offset` of `file`. Raises RefusedError if the file ends before."""
        view, got = memoryview(into.reshape(-1).view(np.uint8)), 0
        while got < len(view):
            count = os.preadv(self._descriptor(file), [view[got:]], offset + got)
            if count == 0:
                raise RefusedError(f"{file}: ends at byte {offset + got}, inside a tensor; it was cut while being read")
            got += count

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            if len(self._descriptors) >= _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            try:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise RefusedError(f"{file}: cannot be read ({error.strerror}); check the path") from error
        self._descriptors.move_to_end(file)
        return self._descriptors[file]


def bands(box: Box, itemsize: int) -> Iterator[Box]:
    """The box in bands that follow each other row-major: whole rows of it, or parts of one row that is too long."""
    limit = BAND_BYTES // itemsize
    rows, cols = max(limit // box.cols, 1), min(box.cols, limit)
    for row in range(0, box.rows, rows):
        for col in range(0, box.cols, cols):
            yield Box(box.row + row, min(rows, box.rows - row), box.col + col, min(cols, box.cols - col))


def tiles(box: Box, itemsize: int) -> Iterator[Box]:
    """The box in tiles as square as it allows, which are read in few runs whether they lie transposed or not."""
    limit = TILE_BYTES // itemsize
    cols = min(box.cols, max(math.isqrt(limit), limit // box.rows))
    rows = min(box.rows, limit // cols)
    for row in range(0, box.rows, rows):
        for col in range(0, box.cols, cols):
            yield Box(box.row + row, min(rows, box.rows - row), box.col + col, min(cols, box.cols - col))


def read_piece(piece: Piece, files: Files) -> Iterator[tuple[Box, np.ndarray]]:
    """The piece's bands as and in the order they lie on disk, each with its bits; the array holds until the next one."""
    itemsize = ITEMSIZE[piece.tensor.dtype]
    buffer = np.empty(min(piece.box.numel, BAND_BYTES // itemsize), bits_dtype(piece.tensor.dtype))
    for band in bands(piece.lying, itemsize):
        bits = buffer[:band.numel]
        read_part(piece, band, files, bits)
        yield band, bits


def read_part(piece: Piece, part: Box, files: Files, into: np.ndarray) -> None:
    """Fill `into`, which is contiguous, with the elements of a box inside the piece's, both as they lie on disk."""
    for offset, start, numel in runs(piece, part):
        files.read(piece.file, offset, into.reshape(-1)[start:start + numel])


def runs(piece: Piece, part: Box) -> Iterator[tuple[int, int, int]]:
    """The runs that a box inside the piece's, as it lies on disk, is there: byte, first element in the box, elements."""
    box, itemsize = piece.turned(part), ITEMSIZE[piece.tensor.dtype]
    first = piece.offset_of(box.row, box.col)
    if part.rows == 1 or piece.pitch == part.cols:
        yield first, 0, part.numel
    else:
        yield from ((first + row * piece.pitch * itemsize, row * part.cols, part.cols) for row in range(part.rows))


class View:
    """One copy of a logical tensor: of each box, the piece that the `number`-th of its replicas keeps."""

    def __init__(self, tensor: Tensor, boxes: dict[Box, list[Piece]], number: int = 0) -> None:
        self.tensor = tensor
        self.pieces = sorted((replica(pieces, number) for pieces in boxes.values()),
                             key=lambda piece: (piece.box.row, piece.box.col))
        self._rows, self._tallest = [piece.box.row for piece in self.pieces], max(piece.box.rows for piece in self.pieces)
        self.is_transposed = any(piece.transposed for piece in self.pieces)
        self._buffer = self._scratch = np.empty(0, bits_dtype(tensor.dtype))

    def parts(self, band: Box) -> Iterator[tuple[Piece, Box]]:
        """The pieces that hold elements of `band`, each with the box of them."""
        first, end = (bisect_left(self._rows, row) for row in (band.row - self._tallest + 1, band.row + band.rows))
        for piece in self.pieces[first:end]:
            part = piece.box.intersect(band)
            if part:
                yield piece, part

    def read(self, band: Box, files: Files) -> np.ndarray:
        """The bits of a box of the tensor, row-major; shape [elements], until the next read."""
        if band.numel > len(self._buffer):
            self._buffer, self._scratch = (np.empty(band.numel, self._buffer.dtype) for _ in range(2))
        bits = self._buffer[:band.numel]
        matrix = bits.reshape(band.rows, band.cols)
        for piece, part in self.parts(band):
            rows = matrix[part.row - band.row:part.row - band.row + part.rows]
            if part.cols == band.cols and not piece.transposed:
                read_part(piece, part, files, rows)
            else:
                lying, scratch = piece.turned(part), self._scratch[:part.numel]
                read_part(piece, lying, files, scratch)
                there = scratch.reshape(lying.rows, lying.cols)
                rows[:, part.col - band.col:part.col - band.col + part.cols] = there.T if piece.transposed else there
        return bits

    def place(self, row: int, col: int) -> tuple[str, int]:
        """The file and byte offset of an element."""
        piece, part = next(self.parts(Box(row, 1, col, 1)))
        return piece.file, piece.offset_of(part.row, part.col)


def replica(pieces: Sequence[Piece], number: int) -> Piece:
    """The `number`-th copy of a box; where there are fewer, they are counted round and round.

    Replicas are numbered ep · tp + tp, so the copies that more expert ranks keep go with the first ones' again.
    """
    return sorted(pieces, key=lambda piece: piece.replica)[number % len(pieces)]


def copies_of(boxes: dict[Box, list[Piece]]) -> int:
    """How many copies of some part of a tensor are kept."""
    return max(map(len, boxes.values()))


_work: Callable | None = None


def in_processes(work: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """work(item) of each item, in their order, by `workers` processes that inherit `work` and never pickle it."""
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
        _work = None


def _call(item: Item) -> Result:
    return _work(item)
