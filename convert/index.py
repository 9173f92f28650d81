"""The index of a checkpoint: for each tensor on disk, which boxes of which logical tensors it holds.

A framework reader finds named tensors at places; this module says what they are, by the family's tables, or, for a name
no family knows, by the partition facts of the sidecar.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from . import families
from .errors import RefusedError
from .fusion import COLS, GATE_UP, QKV, REPLICATED, ROWS, Block, Heads, blocks
from .layout import Layout, Place
from .tensors import ITEMSIZE, MODEL_WEIGHT, Box, Piece, Stored, Tensor

#: the segment of a canonical name that names the fused tensor, and is replaced by each atom's name
_FUSED_SEGMENT = {QKV: "qkv", GATE_UP: "fc1"}


@dataclass(frozen=True, slots=True)
class Found:
    """A tensor as a reader found it: its key in the checkpoint, where it lives, its role, and what the sidecar says."""

    name: str
    place: Place
    role: str
    stored: Stored
    partition_dim: int | None = None
    partition_stride: int = 1
    expert: bool = False

    @property
    def where(self) -> str:
        """The file it lies in, or, for one that is yet to be written, its place."""
        return self.stored.extents[0].file if self.stored.extents else str(self.place)


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor on disk and what it is: `canonical` is its fused canonical name, `blocks` its row blocks in order."""

    found: Found
    canonical: str
    row: families.Row | None
    blocks: tuple[tuple[Tensor, Box], ...]

    @property
    def layer(self) -> int | None:
        layer = families.layer_of(self.canonical)
        return layer and layer[1]

    def pieces(self, replica: int, only: Tensor | None = None) -> list[Piece]:
        """The pieces of its blocks, or of those of one logical tensor; several extents give pieces for each."""
        result, start = [], 0
        itemsize = ITEMSIZE[self.found.stored.dtype]
        for tensor, box in self.blocks:
            if only in (None, tensor):
                for extent, low, high, first in _extents_of(self.found.stored, start * itemsize, box.numel * itemsize):
                    for part, element in box.split_flat(low // itemsize, high // itemsize):
                        result.append(Piece(tensor, part, extent.file, first + element * itemsize - low, replica))
            start += box.numel
        return result


def _extents_of(stored: Stored, start: int, nbytes: int):
    """Parts [low, high) of the byte run [start, start + nbytes) of a tensor, with the extent and file offset of each."""
    position = 0
    for extent in stored.extents:
        low, high = max(start, position), min(start + nbytes, position + extent.nbytes)
        if low < high:
            yield extent, low - start, high - start, extent.offset + low - position
        position += extent.nbytes


@dataclass(slots=True)
class Naming:
    """What turns a checkpoint's names into canonical ones: global layer numbers by (pp, vpp) and path (None: the names
    hold global numbers), experts per rank, heads, gating."""

    dialect: str
    layout: Layout
    layers: dict[tuple[int, int], dict[str, list[int]]] | None
    experts_per_rank: int | None
    heads: Heads | None
    gated: bool

    def hold(self, found: Found) -> Held:
        row = families.find(found.name, self.dialect)
        expert = families.expert_of(found.name)
        if expert is not None and self.experts_per_rank:
            expert += found.place.ep * self.experts_per_rank
        layer = self._global_layer(found)
        canonical = (row.canonical.format(i=layer, e=expert) if row else families.renumber(found.name, layer, expert))
        kind = row.arrangement if row else _kind_by_facts(found, self.layout)
        if kind is None:
            return _hold(found, f"{canonical} of {found.place}", None, REPLICATED, self)
        if (kind == QKV and self.heads is None) or (kind == GATE_UP and not self.gated):
            kind = ROWS
        return _hold(found, canonical, row, kind, self)

    def _global_layer(self, found: Found) -> int | None:
        layer = families.layer_of(found.name)
        if layer is None:
            return None
        prefix, local = layer
        if self.layers is None:
            return local
        numbers = self.layers.get((found.place.pp, found.place.vpp), {}).get(prefix, [])
        if local >= len(numbers):
            raise RefusedError(f"{found.where}: {found.name} is layer {local} of "
                               f"{len(numbers)} that {found.place} should hold; the sidecar is of another run")
        return numbers[local]


def _kind_by_facts(found: Found, layout: Layout) -> str | None:
    """How a tensor of no known family is cut, by the facts of the sidecar; None where they do not say."""
    if found.expert or found.partition_dim is None:
        return None
    if found.partition_dim < 0:
        return REPLICATED
    if layout.tp == 1:
        return ROWS
    return {0: ROWS, 1: COLS}.get(found.partition_dim) if found.partition_stride == 1 else None


def _hold(found: Found, canonical: str, row: families.Row | None, kind: str, naming: Naming) -> Held:
    shape, segment = found.stored.shape, _FUSED_SEGMENT.get(kind)
    try:
        arranged: tuple[Block, ...] = blocks(kind, shape, naming.layout.tp, found.place.tp, naming.heads)
    except RefusedError as error:
        raise RefusedError(f"{found.where}: {found.name}: {error}") from error
    atoms = {b.part: Tensor(found.role, canonical.replace(segment, b.part) if b.part else canonical, found.stored.dtype,
                            b.shape) for b in arranged}
    return Held(found, canonical, row, tuple((atoms[b.part], b.box) for b in arranged))


class Boxes(Mapping):
    """The pieces of each logical tensor by box, where equal boxes are replicas; made when asked for, a few are kept.

    A large model has some hundred boxes for each fused tensor, so that only who holds what is kept for good.
    """

    def __init__(self, holders: dict[Tensor, list[Held]], layout: Layout) -> None:
        self.holders, self.layout = holders, layout
        self._expand = lru_cache(maxsize=64)(self._expanded)

    def __getitem__(self, tensor: Tensor) -> dict[Box, list[Piece]]:
        return self._expand(tensor)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.holders)

    def __len__(self) -> int:
        return len(self.holders)

    def _expanded(self, tensor: Tensor) -> dict[Box, list[Piece]]:
        boxes: dict[Box, list[Piece]] = {}
        for held in self.holders[tensor]:
            for piece in held.pieces(replica_of(held, self.layout), tensor):
                boxes.setdefault(piece.box, []).append(piece)
        return boxes


def replica_of(held: Held, layout: Layout) -> int:
    """A number for the rank among those that may keep copies of one box: its tensor- and expert-parallel place."""
    return held.found.place.ep * layout.tp + held.found.place.tp


@dataclass(slots=True)
class Index:
    """All of a checkpoint's tensors, who holds each logical tensor, and its pieces."""

    held: list[Held]
    layout: Layout
    boxes: Mapping[Tensor, dict[Box, list[Piece]]] | None = None
    holders: dict[Tensor, list[Held]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known: dict[tuple[str, str], Tensor] = {}
        for held in self.held:
            for tensor in dict.fromkeys(tensor for tensor, _ in held.blocks):
                first = known.setdefault((tensor.role, tensor.name), tensor)
                if first != tensor:
                    raise RefusedError(f"{held.found.where}: {tensor.name} ({tensor.role}) is {tensor.dtype} "
                                       f"{list(tensor.shape)} here and {first.dtype} {list(first.shape)} on another rank; "
                                       "these files are of different runs")
                self.holders.setdefault(first, []).append(held)
        if self.boxes is None:
            self.boxes = Boxes(self.holders, self.layout)

    def check_complete(self) -> None:
        """Refuse unless the pieces of every logical tensor cover each of its elements exactly once."""
        for tensor, boxes in self.boxes.items():
            if not covers_once(list(boxes), tensor.rows, tensor.cols):
                files = sorted({piece.file for pieces in boxes.values() for piece in pieces})
                raise RefusedError(f"{files[0]}: the pieces of {tensor.name} ({tensor.role}) found in {len(files)} files "
                                   f"do not make up its shape {list(tensor.shape)} exactly once; a rank is missing")

    def tensors(self, role: str) -> list[Tensor]:
        return [tensor for tensor in self.boxes if tensor.role == role]

    def num_layers(self) -> int:
        return 1 + max((held.layer for held in self.held if held.layer is not None), default=-1)

    def roles(self) -> set[str]:
        return {tensor.role for tensor in self.boxes if tensor.role != MODEL_WEIGHT}


def covers_once(boxes: list[Box], rows: int, cols: int) -> bool:
    """Whether the boxes tile a matrix of rows × cols, with no gap and no overlap."""
    if len(boxes) == 1:
        return boxes[0] == Box(0, rows, 0, cols)
    row_edges = sorted({0, rows, *(b.row for b in boxes), *(b.row + b.rows for b in boxes)})
    col_edges = sorted({0, cols, *(b.col for b in boxes), *(b.col + b.cols for b in boxes)})
    if row_edges[-1] > rows or col_edges[-1] > cols:
        return False
    row_at, col_at = ({edge: k for k, edge in enumerate(edges)} for edges in (row_edges, col_edges))
    count = np.zeros((len(row_edges) - 1, len(col_edges) - 1), np.int32)
    for b in boxes:
        count[row_at[b.row]:row_at[b.row + b.rows], col_at[b.col]:col_at[b.col + b.cols]] += 1
    return bool((count == 1).all())
