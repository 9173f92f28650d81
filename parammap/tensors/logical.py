"""The nouns of a conversion: logical tensors, and tensors as files hold them.

Nothing here reads or writes a file, and nothing here knows a framework or a file format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

#: bytes per element of every dtype that a checkpoint can hold, by torch's name of it
ITEMSIZE = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}

#: dimensions of a tensor; numpy 2 has no more, and torch's own kernels stop there
MAX_DIMS = 64
#: what a dimension, an offset or a number of elements is counted in: int64
MAX_COUNT = (1 << 63) - 1

#: states of a parameter: the weight an optimizer steps, its two Adam moments, and the copy
#: the model computes with
MAIN_PARAM, EXP_AVG, EXP_AVG_SQ, MODEL_PARAM = "weight", "exp_avg", "exp_avg_sq", "model_weight"


def shape_of(sizes: Any) -> tuple[int, ...]:
    """A shape, strides or offsets as a file gives them, as a tuple. Raises ValueError unless it is
    a list or tuple of at most MAX_DIMS counts."""
    if not isinstance(sizes, (list, tuple)) or len(sizes) > MAX_DIMS:
        raise ValueError(f"a shape is no list of up to {MAX_DIMS} sizes")
    return tuple(map(count_of, sizes))


def count_of(number: Any) -> int:
    """A size, offset or number of elements as a file gives it. Raises ValueError unless it is a
    whole number that is not negative and fits in 64 bits."""
    if type(number) is not int or not 0 <= number <= MAX_COUNT:
        raise ValueError("a size or offset is not a count: a whole number from 0 to 2^63 - 1")
    return number


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in a file."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies on disk: row-major, in one extent or, where a container cuts it, in
    several; or, where `strides` (in elements) are given, so, from the begin of one extent that
    holds more than it."""

    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def is_whole(self) -> bool:
        """Whether its extents hold all of its bytes."""
        return self.strides is not None or (
            sum(extent.nbytes for extent in self.extents) == self.nbytes
        )


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that an output file is to hold; `data` is its whole content where that is small and
    known (scalars)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A logical tensor (an atom): one state of one parameter, whole, in [out, in, …] orientation.

    It is seen as a matrix: dim 0 × all the other dims. How rows are grouped (by heads, by groups)
    is a matter of who holds them, and frameworks differ in it; that matrix is what they have in
    common, so regions of the tensor are regions of it."""

    state: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def cols(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def matrix(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    def __str__(self) -> str:
        return f"{self.name} ({self.state})"
