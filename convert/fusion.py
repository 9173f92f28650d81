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
REPLICATED, ROWS, COLS, VOCAB, QKV, STACKED_QKV, QK, GATE_UP, KVQ, EXPERTS_FC1, EXPERTS_FC2, QKV_DOWN = (
    "replicated", "rows", "cols", "vocab", "qkv", "stacked_qkv", "qk", "gate_up", "kvq", "experts_fc1", "experts_fc2",
    "qkv_down")
#: multi-latent attention's down-projections of one rank, of which nobody knows whether several would cut them (cuts.py)
Q_DOWN, KV_DOWN = "q_down", "kv_down"
#: arrangements of tensors that hold all experts of a rank
GROUPED = (EXPERTS_FC1, EXPERTS_FC2)
#: the atom that the rows of a vocabulary's padding make up
PADDING = "padding"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What arrangements depend on beside a tensor's shape; None: nobody recorded it.

    `groups` is `heads` for multi-head attention; `vocab` counts the true vocabulary, without padding; `gated` says whether
    grouped experts have gate and up. `q_down` and `kv_down` are the rows of multi-latent attention's down-projections, and
    `whole_downs` says whether the run's release keeps them whole on every rank.
    """

    heads: int | None = None
    groups: int | None = None
    vocab: int | None = None
    experts: int | None = None
    gated: bool = False
    q_down: int | None = None
    kv_down: int | None = None
    whole_downs: bool | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one atom inside a rank's tensor: the atom's name part ('' for an unfused tensor), shape and box."""

    part: str
    shape: tuple[int, ...]
    box: Box


@lru_cache(maxsize=1024)
def blocks(kind: str, shape: tuple[int, ...], tp: int, rank: int, sizes: Sizes = Sizes(),
           experts: range = range(0)) -> tuple[Block, ...]:
    """The row blocks of tensor-parallel rank `rank`'s tensor of local `shape`, in the order they lie there; `abreast` of
    them at a time lie side by side. `experts` are those that the rank holds."""
    if kind in GROUPED:
        return tuple(_ARRANGEMENTS[kind](shape, tp, rank, sizes, experts))
    return tuple(_ARRANGEMENTS[kind](shape, tp, rank, sizes))


def abreast(kind: str | None, sizes: Sizes) -> int:
    """How many blocks at a time share their rows and lie side by side in each."""
    return 2 if kind == EXPERTS_FC1 and sizes.gated else 1


def local_shape(kind: str, shape: tuple[int, ...], tp: int, sizes: Sizes, ep: int = 1) -> tuple[int, ...]:
    """Each rank's shape of a tensor that is `shape` as a whole. Raises RefusedError where tp does not divide it."""
    for what, count in _indivisible(kind, shape, sizes) if tp > 1 and kind != REPLICATED else ():
        if count % tp:
            raise RefusedError(f"{count} {what} cannot be divided over tp {tp}")
    if kind in (Q_DOWN, KV_DOWN) and tp > 1:
        raise RefusedError("nobody recorded whether the release keeps it whole on every tensor-parallel rank; keep tp 1, or "
                           "convert with the sidecar")
    dim, parts = _cut(kind, tp, ep)
    return (*shape[:dim], shape[dim] // parts, *shape[dim + 1:]) if parts > 1 else shape


def whole_shape(kind: str, shape: tuple[int, ...], tp: int, ep: int = 1) -> tuple[int, ...]:
    """The shape as a whole of a tensor of which each rank holds `shape`."""
    dim, parts = _cut(kind, tp, ep)
    return (*shape[:dim], shape[dim] * parts, *shape[dim + 1:]) if parts > 1 else shape


def _cut(kind: str, tp: int, ep: int) -> tuple[int, int]:
    """The dimension that is cut, and over how many ranks."""
    return 1 if kind in (COLS, EXPERTS_FC1) else 0, 1 if kind == REPLICATED else tp * ep if kind in GROUPED else tp


def _indivisible(kind: str, shape: tuple[int, ...], sizes: Sizes) -> Iterator[tuple[str, int]]:
    """What must not be cut, and how many of it a tensor has."""
    if kind in (QKV, STACKED_QKV, QK, KVQ):
        yield "attention heads", sizes.heads
        yield "query groups", sizes.groups
    elif kind == GATE_UP:
        yield "rows each of gate and up", shape[0] // 2
    elif kind == VOCAB:
        yield "rows of the padded vocabulary", shape[0]
    elif kind == EXPERTS_FC1:
        yield "columns of each expert's gate and up", shape[1] // sizes.experts // (2 if sizes.gated else 1)
    elif kind == EXPERTS_FC2:
        yield "rows of each expert", shape[0] // sizes.experts
    elif kind == QKV_DOWN:
        yield "rows of q's down-projection", sizes.q_down
        yield "rows of kv's down-projection", sizes.kv_down
    else:
        yield ("columns", shape[1]) if kind == COLS else ("rows", shape[0])


def _replicated(shape, tp, rank, sizes) -> list[Block]:
    return [_block("", shape, 0, _rows(shape))]


def _split_rows(shape, tp, rank, sizes) -> list[Block]:
    rows = _rows(shape)
    return [_block("", (rows * tp, *shape[1:]), rank * rows, rows)]


def _vocab(shape, tp, rank, sizes) -> list[Block]:
    """Rows of the true vocabulary and of its padding (Megatron-LM, tokenizer's _vocab_size_with_padding)."""
    padding = shape[0] * tp - sizes.vocab
    if padding < 0:
        raise RefusedError(f"{shape[0]} × {tp} rows cannot hold a vocabulary of {sizes.vocab}")
    runs = [("", 0, sizes.vocab), (PADDING, 0, padding)]
    totals = {part: (rows, *shape[1:]) for part, _, rows in runs}
    return [_block(part, totals[part], row, rows) for part, row, rows in _chunk(iter(runs), rank * shape[0], shape[0])]


def _split_cols(shape, tp, rank, sizes) -> list[Block]:
    if len(shape) != 2:
        raise RefusedError(f"a tensor of shape {list(shape)} cannot be split along dim 1")
    rows, cols = shape
    return [Block("", (rows, cols * tp), Box(0, rows, rank * cols, cols))]


def _gate_up(shape, tp, rank, sizes) -> list[Block]:
    """[gate; up] on every rank (Megatron-LM, ParallelMLP and core MLP with gated_linear_unit)."""
    return _stacked(shape, tp, rank, ("gate", "up"))


def _kvq(shape, tp, rank, sizes) -> list[Block]:
    """[k; v; q] on every rank (metaseq, ModelParallelMultiheadAttention's qkv_proj)."""
    return _stacked(shape, tp, rank, ("k", "v", "q"))


def _stacked_qkv(shape, tp, rank, sizes) -> list[Block]:
    """[q; k; v] on every rank (transformers, GPT2Attention's c_attn, transposed; Merak, its col_linear)."""
    return _stacked(shape, tp, rank, ("q", "k", "v"))


def _stacked(shape, tp, rank, parts: tuple[str, ...]) -> list[Block]:
    rows, rest = divmod(_rows(shape), len(parts))
    if rest:
        raise RefusedError(f"a tensor of shape {list(shape)} cannot be {len(parts)} equal parts: {', '.join(parts)}")
    return [_block(part, (rows * tp, *shape[1:]), rank * rows, rows) for part in parts]


def _qkv_down(shape, tp, rank, sizes) -> list[Block]:
    """[q; kv] on every rank (megatron-core, FusedMLASelfAttention's linear_qkv_down_proj, 0.17 and later)."""
    if None in (sizes.q_down, sizes.kv_down) or shape[0] * tp != sizes.q_down + sizes.kv_down:
        raise RefusedError(f"{shape[0]} × {tp} rows are not the {sizes.q_down} and {sizes.kv_down} that the arguments say")
    parts = [(Q_DOWN, sizes.q_down // tp), (KV_DOWN, sizes.kv_down // tp)]
    return [_block(part, (rows * tp, *shape[1:]), rank * rows, rows) for part, rows in parts]


def _experts_fc1(shape, tp, rank, sizes, experts: range) -> list[Block]:
    """[expert, in, gate and up side by side], whatever the shape says (megatron-core, GroupedMLP.weight1)."""
    parts = ("gate", "up") if sizes.gated else ("fc1",)
    cols, rest = divmod(shape[1], len(experts) * len(parts))
    if rest:
        raise RefusedError(f"{shape[1]} columns are not {len(experts)} experts' {' and '.join(parts)}")
    return [Block(f"{expert}.{part}", (shape[0], cols * tp), Box(0, shape[0], rank * cols, cols))
            for expert in experts for part in parts]


def _experts_fc2(shape, tp, rank, sizes, experts: range) -> list[Block]:
    """[expert, in, out] (megatron-core, GroupedMLP.weight2)."""
    rows, rest = divmod(shape[0], len(experts))
    if rest:
        raise RefusedError(f"{shape[0]} rows are not those of {len(experts)} experts")
    return [_block(f"{expert}.fc2", (rows * tp, *shape[1:]), rank * rows, rows) for expert in experts]


def _qkv(shape, tp, rank, sizes) -> list[Block]:
    """A plain chunk of the rows [group, (heads / group) q + k + v, head size] (Megatron-LM, checkpoint version ≥ 2)."""
    return _attention(shape, tp, rank, sizes, ("q", "k", "v"))


def _qk(shape, tp, rank, sizes) -> list[Block]:
    """A plain chunk of the rows [head, q + k, head size] (Yuan-2.0, LocalizedFilter's attention)."""
    return _attention(shape, tp, rank, sizes, ("q", "k"))


def _attention(shape, tp, rank, sizes, parts: tuple[str, ...]) -> list[Block]:
    if sizes.heads is None:
        raise RefusedError("the number of attention heads is not recorded")
    rows = _rows(shape)
    per_group = sizes.heads // sizes.groups
    size, rest = divmod(rows * tp, sizes.groups * (per_group + len(parts) - 1))
    if rest or sizes.heads % sizes.groups:
        raise RefusedError(f"{rows} × {tp} rows do not fit {sizes.heads} heads in {sizes.groups} groups: {parts}")
    in_group = {part: per_group * size if part == "q" else size for part in parts}
    runs = ((part, group * count, count) for group in range(sizes.groups) for part, count in in_group.items())
    return [_block(part, (sizes.groups * in_group[part], *shape[1:]), row, count)
            for part, row, count in _chunk(runs, rank * rows, rows)]


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


_ARRANGEMENTS = {REPLICATED: _replicated, Q_DOWN: _replicated, KV_DOWN: _replicated, ROWS: _split_rows,
                 COLS: _split_cols, VOCAB: _vocab, QKV: _qkv,
                 STACKED_QKV: _stacked_qkv, QK: _qk,
                 GATE_UP: _gate_up, KVQ: _kvq, QKV_DOWN: _qkv_down, EXPERTS_FC1: _experts_fc1, EXPERTS_FC2: _experts_fc2}
