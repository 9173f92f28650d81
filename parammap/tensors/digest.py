"""A digest of a logical tensor that does not depend on the file, layout or order its pieces come
in.

    digest = Σ over elements of  mix(bits) · R(row) · C(col)   mod 2^64

with `mix` a bijection of the element's bits, and R, C odd pseudo-random numbers per row and column
of the tensor seen as a matrix (dim 0 × the rest). The sum is additive: the digests of disjoint
boxes add up to the digest of the tensor."""

from __future__ import annotations

import threading
from functools import lru_cache

import numpy as np

from parammap.tensors.arrays import Array
from parammap.tensors.logical import ITEMSIZE
from parammap.tensors.region import Cells, Region

MASK = (1 << 64) - 1
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_ROW_SEED, _COL_SEED = 0x243F6A8885A308D3, 0x13198A2E03707344
#: the width that elements are mixed in: its type, an odd factor, and the shift that folds the high
#: half into the low one
_MIX_32 = np.uint32, np.uint32(0x9E3779B1), np.uint32(16)
_MIX_64 = np.uint64, np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
#: elements digested at a time: the scratch then stays in a core's second-level cache, and no
#: temporary is allocated
_TILE = 1 << 15
_TABLED_WEIGHTS = 1 << 17


class _Scratch(threading.local):
    """Each thread's room for one tile."""

    def __init__(self) -> None:
        self.mixed, self.shifted, self.wide = (np.empty(_TILE, np.uint64) for _ in range(3))


_scratch = _Scratch()


def bits_dtype(dtype: str) -> type:
    """The unsigned numpy type that is as wide as an element of `dtype`."""
    return _BITS[ITEMSIZE[dtype]]


def cells_digest(bits: Array, cells: Cells) -> int:
    """The share of some elements in their tensor's digest; `bits` are unsigned integers, in an
    array of any strides."""
    if bits.size > _TILE:
        order = sorted(range(bits.ndim), key=lambda axis: -bits.strides[axis])
        axis = next(axis for axis in order if bits.shape[axis] > 1)
        count = max(bits.shape[axis] * _TILE // bits.size, 1)
        total = 0
        for start in range(0, bits.shape[axis], count):
            part = bits[(slice(None),) * axis + (slice(start, start + count),)]
            total += cells_digest(
                part,
                cells.narrow(Region((0,) * bits.ndim, bits.shape).narrow(axis, start, start + 1)),
            )
        return total & MASK
    cols = bits.shape[-1]
    rows, columns = _row_weights(bits.shape[:-1], cells), _weights(_COL_SEED, cells.col, cols)
    last = bits.ndim - 1
    if cols > 1 and bits.strides[last] > max(bits.strides[:last]):  # column after column in memory
        mixed = _mix(bits.transpose(last, *range(last))).reshape(cols, len(rows))
        return int(np.dot(np.einsum("cr,r->c", mixed, rows), columns)) & MASK
    mixed = _mix(bits)
    if cols == 1:
        return int(np.dot(mixed.reshape(-1), rows)) * int(columns[0]) & MASK
    return int(np.dot(np.einsum("rc,c->r", mixed.reshape(len(rows), cols), columns), rows)) & MASK


def _row_weights(shape: tuple[int, ...], cells: Cells) -> Array:
    """The numbers of the rows of an array's axes of rows, row-major; shape [rows]."""
    count = sum((size - 1) * step for size, step in zip(shape, cells.steps, strict=True)) + 1
    weights = _weights(_ROW_SEED, cells.row, count)
    if len(shape) == 1:
        return weights
    return np.ndarray(
        shape, np.uint64, weights, 0, tuple(8 * step for step in cells.steps)
    ).reshape(-1)


def _mix(bits: Array) -> Array:
    """The mixed elements, in a row-major array of the same shape, until the next call of this
    thread."""
    width, factor, shift = _MIX_64 if bits.itemsize == 8 else _MIX_32
    mixed, shifted = (
        _scratch.mixed.view(width)[: bits.size],
        _scratch.shifted.view(width)[: bits.size],
    )
    np.add(bits, width(1), out=mixed.reshape(bits.shape), dtype=width)
    np.multiply(mixed, factor, out=mixed)
    np.right_shift(mixed, shift, out=shifted)
    np.bitwise_xor(mixed, shifted, out=mixed)
    wide = _scratch.wide[: bits.size]
    np.copyto(wide, mixed)
    return wide.reshape(bits.shape)


def _weights(seed: int, start: int, count: int) -> Array:
    """`count` odd pseudo-random numbers of `seed` from number `start` on; shape [count], uint64."""
    if start + count > _TABLED_WEIGHTS:
        return _splitmix(seed, start, count)
    return _weight_table(seed)[start : start + count]


@lru_cache(maxsize=2)
def _weight_table(seed: int) -> Array:
    return _splitmix(seed, 0, _TABLED_WEIGHTS)


def _splitmix(seed: int, start: int, count: int) -> Array:
    """`count` odd numbers of the splitmix64 sequence of `seed`, from its `start`-th on; shape
    [count], uint64."""
    x = np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(
        0x9E3779B97F4A7C15
    ) + np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
