"""A digest of a logical tensor that does not depend on the file, layout or order its pieces come in.

    digest = Σ over elements of  mix(bits) · R(row) · C(col)   mod 2^64

with `mix` a bijection of the element's bits, and R, C odd pseudo-random numbers per row and column of the tensor seen as
a matrix (dim 0 × the rest). The sum is additive: the digests of disjoint boxes add up to the digest of the tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from .tensors import ITEMSIZE, Box

MASK = (1 << 64) - 1
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_ROW_SEED, _COL_SEED = 0x243F6A8885A308D3, 0x13198A2E03707344
#: the width that elements are mixed in: its type, an odd factor, and the shift that folds the high half into the low one
_MIX_32 = np.uint32, np.uint32(0x9E3779B1), np.uint32(16)
_MIX_64 = np.uint64, np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
#: elements digested at a time: the scratch then stays in a core's second-level cache, and no temporary is allocated
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


def box_digest(bits: np.ndarray, box: Box, turned: bool = False) -> int:
    """The share of `box` in its tensor's digest; `bits` holds the box's elements, row-major, as unsigned integers.

    If `turned`, the box and its elements are of the transposed matrix; the digest is the tensor's own all the same.
    """
    seeds = (_COL_SEED, _ROW_SEED) if turned else (_ROW_SEED, _COL_SEED)
    return sum(_tile_digest(bits[start:start + tile.numel], tile, *seeds) for tile, start in _tiles(box)) & MASK


def _tiles(box: Box) -> Iterator[tuple[Box, int]]:
    """Boxes of at most _TILE consecutive elements of `box`, each with its start."""
    cols = min(box.cols, _TILE)
    rows = _TILE // cols if cols == box.cols else 1
    for row in range(0, box.rows, rows):
        for col in range(0, box.cols, cols):
            yield (Box(box.row + row, min(rows, box.rows - row), box.col + col, min(cols, box.cols - col)),
                   row * box.cols + col)


def _tile_digest(bits: np.ndarray, tile: Box, row_seed: int, col_seed: int) -> int:
    mixed, rows = _mix(bits), _weights(row_seed, tile.row, tile.rows)
    columns = _weights(col_seed, tile.col, tile.cols)
    if tile.cols == 1:
        return int(np.dot(mixed, rows)) * int(columns[0])
    return int(np.dot(np.einsum("rc,c->r", mixed.reshape(tile.rows, tile.cols), columns), rows))


def _mix(bits: np.ndarray) -> np.ndarray:
    width, factor, shift = _MIX_64 if bits.itemsize == 8 else _MIX_32
    mixed, shifted = _scratch.mixed.view(width)[:len(bits)], _scratch.shifted.view(width)[:len(bits)]
    np.add(bits, width(1), out=mixed, dtype=width)
    np.multiply(mixed, factor, out=mixed)
    np.right_shift(mixed, shift, out=shifted)
    np.bitwise_xor(mixed, shifted, out=mixed)
    wide = _scratch.wide[:len(bits)]
    np.copyto(wide, mixed)
    return wide


def _weights(seed: int, start: int, count: int) -> np.ndarray:
    """`count` odd pseudo-random numbers of `seed` from number `start` on; shape [count], uint64."""
    if start + count > _TABLED_WEIGHTS:
        return _splitmix(seed, start, count)
    return _weight_table(seed)[start:start + count]


@lru_cache(maxsize=2)
def _weight_table(seed: int) -> np.ndarray:
    return _splitmix(seed, 0, _TABLED_WEIGHTS)


def _splitmix(seed: int, start: int, count: int) -> np.ndarray:
    """`count` odd numbers of the splitmix64 sequence of `seed`, from its `start`-th on; shape [count], uint64."""
    x = np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
