"""A digest of a logical tensor that does not depend on the file, layout or order its pieces come in.

    digest = Σ over elements of  mix(bits) · R(row) · C(col)   mod 2^64

with `mix` a bijection of the element's bits, and R, C odd pseudo-random numbers per row and column of the tensor seen as
a matrix (dim 0 × the rest). The sum is additive: the digests of disjoint boxes add up to the digest of the tensor.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .tensors import ITEMSIZE, Box

MASK = (1 << 64) - 1
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_ROW_SEED, _COL_SEED = 0x243F6A8885A308D3, 0x13198A2E03707344
_MIX = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(32)
_ONE = np.uint64(1)
_CACHED_WEIGHTS = 1 << 16


def bits_dtype(dtype: str) -> type:
    """The unsigned numpy type that is as wide as an element of `dtype`."""
    return _BITS[ITEMSIZE[dtype]]


def box_digest(bits: np.ndarray, box: Box) -> int:
    """The share of `box` in its tensor's digest; `bits` holds the box's elements, row-major, as unsigned integers."""
    mixed = _mix(bits).reshape(box.rows, box.cols)
    columns = _weights(_COL_SEED, box.col, box.cols)
    per_row = mixed[:, 0] * columns if box.cols == 1 else np.dot(mixed, columns)
    return int(np.dot(per_row, _weights(_ROW_SEED, box.row, box.rows)))


def _mix(bits: np.ndarray) -> np.ndarray:
    if bits.dtype == np.uint16:
        return np.take(_mix_table(), bits, mode="wrap")
    return _mix_numbers(bits)


def _mix_numbers(bits: np.ndarray) -> np.ndarray:
    mixed = np.add(bits, _ONE, dtype=np.uint64)
    np.multiply(mixed, _MIX, out=mixed)
    mixed ^= mixed >> _SHIFT
    return mixed


@lru_cache(maxsize=1)
def _mix_table() -> np.ndarray:
    return _mix_numbers(np.arange(1 << 16, dtype=np.uint16))


def _weights(seed: int, start: int, count: int) -> np.ndarray:
    if count > _CACHED_WEIGHTS:
        return _splitmix(seed, start, count)
    return _cached_weights(seed, start, count)


@lru_cache(maxsize=64)
def _cached_weights(seed: int, start: int, count: int) -> np.ndarray:
    return _splitmix(seed, start, count)


def _splitmix(seed: int, start: int, count: int) -> np.ndarray:
    """`count` odd numbers of the splitmix64 sequence of `seed`, from its `start`-th on; shape [count], uint64."""
    x = np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | _ONE
