"""Fused tensors as arrangements of atoms: which rows of q, k, v, gate and up a rank's piece of a fused tensor holds.

Tensor-parallel splitting cuts atoms; a fused tensor is only the order in which row blocks of atoms follow each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from .errors import RefusedError
from .tensors import Box

#: how a family's tensor is cut over tensor-parallel ranks, and which atoms it is made of
REPLICATED, ROWS, COLS, QKV, GATE_UP = "replicated", "rows", "cols", "qkv", "gate_up"


@dataclass(frozen=True, slots=True)
class Heads:
    """What the order of a fused attention projection depends on; `groups` is `heads` for multi-head attention."""

    heads: int
    groups: int


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one atom inside a rank's tensor: the atom's name part ('' for an unfused tensor), shape and box."""

    part: str
    shape: tuple[int, ...]
    box: Box


@lru_cache(maxsize=1024)
def blocks(kind: str, shape: tuple[int, ...], tp: int, rank: int, heads: Heads | None = None) -> tuple[Block, ...]:
    """The row blocks of tensor-parallel rank `rank`'s tensor of local `shape`, in the order they lie there."""
    return tuple(_ARRANGEMENTS[kind](shape, tp, rank, heads))


def _replicated(shape, tp, rank, heads) -> list[Block]:
    return [_block("", shape, 0, _rows(shape))]


def _split_rows(shape, tp, rank, heads) -> list[Block]:
    rows = _rows(shape)
    return [_block("", (rows * tp, *shape[1:]), rank * rows, rows)]


def _split_cols(shape, tp, rank, heads) -> list[Block]:
    if len(shape) != 2:
        raise RefusedError(f"a tensor of shape {list(shape)} cannot be split along dim 1")
    rows, cols = shape
    return [Block("", (rows, cols * tp), Box(0, rows, rank * cols, cols))]


def _gate_up(shape, tp, rank, heads) -> list[Block]:
    """[gate; up] on every rank (Megatron-LM, ParallelMLP and core MLP with gated_linear_unit)."""
    half, odd = divmod(_rows(shape), 2)
    if odd:
        raise RefusedError(f"a gated tensor of shape {list(shape)} has an odd number of rows")
    return [_block(part, (half * tp, *shape[1:]), rank * half, half) for part in ("gate", "up")]


def _qkv(shape, tp, rank, heads) -> list[Block]:
    """A plain chunk of the rows [group, (heads / group) q + k + v, head size] (Megatron-LM, checkpoint version ≥ 2)."""
    if heads is None:
        raise RefusedError("the number of attention heads is not recorded")
    rows = _rows(shape)
    per_group = heads.heads // heads.groups
    size, rest = divmod(rows * tp, heads.groups * (per_group + 2))
    if rest or heads.heads % heads.groups:
        raise RefusedError(f"{rows} × {tp} rows of q, k and v do not fit {heads.heads} heads in {heads.groups} groups")
    totals = {"q": heads.heads * size, "k": heads.groups * size, "v": heads.groups * size}
    return [_block(part, (totals[part], *shape[1:]), row, count)
            for part, row, count in _chunk(_qkv_rows(heads.groups, per_group, size), rank * rows, rows)]


def _qkv_rows(groups: int, per_group: int, size: int) -> Iterator[tuple[str, int, int]]:
    for group in range(groups):
        yield "q", group * per_group * size, per_group * size
        yield "k", group * size, size
        yield "v", group * size, size


def _chunk(runs: Iterator[tuple[str, int, int]], start: int, count: int) -> Iterator[tuple[str, int, int]]:
    """The rows [start, start + count) of row runs (part, first row, rows) that follow each other."""
    position = 0
    for part, row, rows in runs:
        low, high = max(start, position), min(start + count, position + rows)
        if low < high:
            yield part, row + low - position, high - low
        position += rows


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def _block(part: str, shape: tuple[int, ...], row: int, rows: int) -> Block:
    cols = 1
    for size in shape[1:]:
        cols *= size
    return Block(part, shape, Box(row, rows, 0, cols))


_ARRANGEMENTS = {REPLICATED: _replicated, ROWS: _split_rows, COLS: _split_cols, QKV: _qkv, GATE_UP: _gate_up}
