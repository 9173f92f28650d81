"""The nouns of a conversion: where bytes lie on disk, and which box of which logical tensor they are.

Nothing here reads or writes a file, and nothing here knows a framework or a file format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

#: bytes per element of every dtype that a checkpoint can hold, by torch's name of it
ITEMSIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}

#: roles of the training state: the weight an optimizer steps, its two Adam moments, and the copy the model computes with
WEIGHT, EXP_AVG, EXP_AVG_SQ, MODEL_WEIGHT = "weight", "exp_avg", "exp_avg_sq", "model_weight"


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in a file."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies on disk: row-major, in one extent or, where a container cuts it, in several."""

    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that an output file is to hold; `data` is its whole content where that is small and known (scalars)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A logical tensor (an atom): one role of one parameter, whole, in [out, in, …] orientation."""

    role: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def cols(self) -> int:
        return math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Box:
    """A block of rows × columns of a logical tensor, which is seen as a matrix: dim 0 × all the other dims."""

    row: int
    rows: int
    col: int
    cols: int

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    def intersect(self, other: Box) -> Box | None:
        row, col = max(self.row, other.row), max(self.col, other.col)
        rows = min(self.row + self.rows, other.row + other.rows) - row
        cols = min(self.col + self.cols, other.col + other.cols) - col
        return Box(row, rows, col, cols) if rows > 0 and cols > 0 else None

    def flipped(self) -> Box:
        """The same block of the transposed matrix."""
        return Box(self.col, self.cols, self.row, self.rows)

    def split_flat(self, start: int, stop: int) -> Iterator[tuple[Box, int]]:
        """The at most three boxes that make up the row-major elements [start, stop) of this box, each with its start."""
        if start == 0 and stop == self.numel:
            yield self, 0
            return
        while start < stop:
            row, col = divmod(start, self.cols)
            if col == 0 and stop - start >= self.cols:
                rows, cols = (stop - start) // self.cols, self.cols
            else:
                rows, cols = 1, min(self.cols - col, stop - start)
            yield Box(self.row + row, rows, self.col + col, cols), start
            start += rows * cols


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a logical tensor on disk, in the tensor's dtype: from byte `offset` of `file` on, its rows `stride` elements
    apart (0: one directly after the other). If `transposed`, the file holds the transpose of the box: its columns as rows.

    `replica` tells apart the copies that several ranks keep of the same box (the tensor-parallel rank that wrote it).
    """

    tensor: Tensor
    box: Box
    file: str
    offset: int
    replica: int = 0
    stride: int = 0
    transposed: bool = False

    @property
    def lying(self) -> Box:
        """Its box as the file holds it."""
        return self.turned(self.box)

    @property
    def pitch(self) -> int:
        """The elements from the begin of one of the file's rows to the begin of the next."""
        return self.stride or self.lying.cols

    def turned(self, box: Box) -> Box:
        """A box inside its own as the file holds it, rows and columns exchanged if it lies transposed; and back again."""
        return box.flipped() if self.transposed else box

    def offset_of(self, row: int, col: int) -> int:
        """The byte of the file where the tensor's element [row, col] begins."""
        at, lying = self.turned(Box(row, 1, col, 1)), self.lying
        return self.offset + ((at.row - lying.row) * self.pitch + at.col - lying.col) * ITEMSIZE[self.tensor.dtype]
