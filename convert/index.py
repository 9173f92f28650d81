"""The index of a checkpoint: for each tensor on disk, which boxes of which logical tensors it holds.

A framework reader finds named tensors at places; this module says what they are, by the family's tables, or, for a name
no family knows, by the partition facts of the sidecar.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np

from . import families
from .cuts import UNRECORDED, Partition, kind_of
from .errors import RefusedError
from .fusion import (
    EXPERTS_FC1,
    EXPERTS_FC2,
    GATE_UP,
    GROUPED,
    KVQ,
    PADDING,
    QK,
    QKV,
    QKV_DOWN,
    REPLICATED,
    ROWS,
    STACKED_QKV,
    VOCAB,
    Block,
    Sizes,
    abreast,
    blocks,
)
from .layout import Layout, Place
from .tensors import ITEMSIZE, MODEL_WEIGHT, Box, Piece, Stored, Tensor

#: the segment of a canonical name that names the fused tensor, and is replaced by each atom's name
_FUSED_SEGMENT = {QKV: "qkv", STACKED_QKV: "qkv", QK: "qk", KVQ: "qkv", GATE_UP: "fc1", EXPERTS_FC1: "grouped.fc1",
                  EXPERTS_FC2: "grouped.fc2", QKV_DOWN: "qkv_down"}


@dataclass(frozen=True, slots=True)
class Found:
    """A tensor as a reader found it: its key in the checkpoint, where it lives, its role, and what the sidecar says."""

    name: str
    place: Place
    role: str
    stored: Stored
    partition: Partition = UNRECORDED

    @property
    def where(self) -> str:
        """The file it lies in, or, for one that is yet to be written, its place."""
        return self.stored.extents[0].file if self.stored.extents else str(self.place)


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor on disk and what it is: `canonical` is its fused canonical name, `kind` its arrangement (None: nobody knows
    how it is cut), `blocks` its row blocks in order. `abreast` of them, if more than one, share their rows and lie side
    by side in each."""

    found: Found
    canonical: str
    row: families.Row | None
    kind: str | None
    blocks: tuple[tuple[Tensor, Box], ...]
    abreast: int = 1

    @property
    def is_tied_head(self) -> bool:
        """Whether it is the last stage's copy of the word embedding."""
        return self.canonical == families.WORD_EMBEDDING and self.row is not None and self.row.canonical == families.HEAD

    @property
    def transposed(self) -> bool:
        """Whether it lies on disk as [in, out]; its blocks then lie side by side in each row of the file."""
        return is_transposed(self.row, self.found.stored.shape)

    @property
    def layer(self) -> int | None:
        layer = families.layer_of(self.canonical)
        return layer and layer[1]

    def pieces(self, replica: int, only: Tensor | None = None) -> list[Piece]:
        """The pieces of its blocks, or of those of one logical tensor; several extents give pieces for each."""
        if self.transposed:
            return list(self._pieces_transposed(replica, only))
        if self.abreast > 1:
            return list(self._pieces_abreast(replica, only))
        result, start = [], 0
        itemsize = ITEMSIZE[self.found.stored.dtype]
        for tensor, box in self.blocks:
            if only in (None, tensor):
                for extent, low, high, first in _extents_of(self.found.stored, start * itemsize, box.numel * itemsize):
                    for part, element in box.split_flat(low // itemsize, high // itemsize):
                        result.append(Piece(tensor, part, extent.file, first + element * itemsize - low, replica))
            start += box.numel
        return result

    def _pieces_abreast(self, replica: int, only: Tensor | None) -> Iterator[Piece]:
        extent, = self.found.stored.extents
        itemsize, start = ITEMSIZE[self.found.stored.dtype], 0
        for first in range(0, len(self.blocks), self.abreast):
            band = self.blocks[first:first + self.abreast]
            pitch, col = sum(box.cols for _, box in band), 0
            for tensor, box in band:
                if only in (None, tensor):
                    yield Piece(tensor, box, extent.file, extent.offset + (start + col) * itemsize, replica, pitch)
                col += box.cols
            start += pitch * band[0][1].rows

    def _pieces_transposed(self, replica: int, only: Tensor | None) -> Iterator[Piece]:
        """Each row of the file holds one column of all blocks."""
        stored, pitch = self.found.stored, sum(box.rows for _, box in self.blocks)
        itemsize, matrix = ITEMSIZE[stored.dtype], Box(0, stored.numel // pitch, 0, pitch)
        for extent, low, high, first in _extents_of(stored, 0, stored.nbytes):
            for run, start in matrix.split_flat(low // itemsize, high // itemsize):
                left = 0
                for tensor, box in self.blocks:
                    part = run.intersect(Box(0, matrix.rows, left, box.rows))
                    if part and only in (None, tensor):
                        element = start + part.col - run.col
                        yield Piece(tensor, Box(box.row + part.col - left, part.cols, box.col + part.row, part.rows),
                                    extent.file, first + element * itemsize - low, replica, pitch, transposed=True)
                    left += box.rows


def is_transposed(row: families.Row | None, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape on disk is the transpose, [in, out], of what it is logically; only matrices are."""
    return row is not None and row.transposed and len(shape) == 2


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
    hold global numbers), experts per rank, what the model is like: sizes, gating, and whether its head is the word
    embedding (None: nobody recorded it, and the two count as different tensors)."""

    dialect: str
    layout: Layout
    layers: dict[tuple[int, int], dict[str, list[int]]] | None
    experts_per_rank: int | None
    sizes: Sizes
    gated: bool
    tied: bool | None = None

    def canonical(self, found: Found) -> str:
        """The canonical name, fused, that a tensor has if it is cut in a way that somebody knows."""
        row = families.find(found.name, self.dialect)
        try:
            layer, expert = self.layer(found.name, found.place), self.expert(found.name, found.place)
        except RefusedError as error:
            raise RefusedError(f"{found.where}: {error}") from error
        canonical = row.canonical.format(i=layer, e=expert) if row else families.renumber(found.name, layer, expert)
        is_tied = canonical == families.HEAD and (self.tied or found.name in families.TIED_HEADS)
        return families.WORD_EMBEDDING if is_tied else canonical

    def hold(self, found: Found) -> Held:
        row, canonical = families.find(found.name, self.dialect), self.canonical(found)
        kind = kind_of(found.name, row, found.partition, found.stored.shape, self.layout.tp, self.sizes)
        if kind is None or (kind in GROUPED and not self.sizes.experts):
            return _hold(found, f"{canonical} of {found.place}", None, None, self)
        if self._is_plain(kind):
            kind = ROWS
        return _hold(found, canonical, row, kind, self)

    def _is_plain(self, kind: str) -> bool:
        """Whether a tensor that may be fused is plain rows in this model."""
        return ((kind == QKV and self.sizes.heads is None) or (kind == GATE_UP and not self.gated)
                or (kind == VOCAB and self.sizes.vocab is None))

    def expert(self, name: str, place: Place) -> int | None:
        """The global number of the expert that a name is of."""
        expert = families.expert_of(name)
        return expert if expert is None else expert + place.ep * (self.experts_per_rank or 0)

    def experts_of(self, place: Place) -> range:
        """The global numbers of the experts that a rank holds, where their number is recorded."""
        count = (self.sizes.experts or 0) // self.layout.ep
        return range(place.ep * count, (place.ep + 1) * count)

    def layer(self, name: str, place: Place) -> int | None:
        """The global number of the layer that a name is of."""
        layer = families.layer_of(name)
        if layer is None or self.layers is None:
            return layer and layer[1]
        prefix, local = layer
        numbers = self.layers.get((place.pp, place.vpp), {}).get(prefix, [])
        if local >= len(numbers):
            raise RefusedError(f"{name} is layer {local} of {len(numbers)} that {place} should hold; the sidecar is of "
                               "another run")
        return numbers[local]


def _hold(found: Found, canonical: str, row: families.Row | None, kind: str | None, naming: Naming) -> Held:
    side_by_side = abreast(kind, naming.sizes)
    shape, turned = found.stored.shape, is_transposed(row, found.stored.shape)
    if turned and side_by_side > 1:
        raise RefusedError(f"{found.where}: {found.name} lies transposed, which {kind} never does")
    try:
        arranged: tuple[Block, ...] = blocks(kind or REPLICATED, shape[::-1] if turned else shape, naming.layout.tp,
                                             found.place.tp, naming.sizes, naming.experts_of(found.place))
    except RefusedError as error:
        raise RefusedError(f"{found.where}: {found.name}: {error}") from error
    return Held(found, canonical, row, kind, atoms(found.role, canonical, kind, found.stored.dtype, arranged),
                side_by_side)


def atoms(role: str, canonical: str, kind: str | None, dtype: str,
          arranged: tuple[Block, ...]) -> tuple[tuple[Tensor, Box], ...]:
    """The logical tensors of which a tensor's row blocks are boxes."""
    tensors = {part: Tensor(role, atom_name(canonical, kind, part), dtype, shape)
               for part, shape in {block.part: block.shape for block in arranged}.items()}
    return tuple((tensors[block.part], block.box) for block in arranged)


def atom_name(canonical: str, kind: str | None, part: str) -> str:
    """The name of the logical tensor that a part of a tensor belongs to."""
    if not part:
        return canonical
    return canonical.replace(_FUSED_SEGMENT[kind], part) if kind in _FUSED_SEGMENT else f"{canonical}.{part}"


def is_padding(tensor: Tensor) -> bool:
    """Whether a logical tensor is a vocabulary's padding, of which each layout has its own."""
    return tensor.name.endswith(f".{PADDING}")


class Boxes(Mapping):
    """The pieces of each logical tensor by box, by row, where equal boxes are replicas; made when asked for, a few are kept.

    A large model has some hundred boxes for each fused tensor, so that only who holds what is kept for good.
    """

    def __init__(self, holders: dict[Tensor, list[Held]], layout: Layout) -> None:
        self.holders, self.layout = holders, layout
        self._expand = lru_cache(maxsize=64)(self._expanded)
        self._rows = lru_cache(maxsize=64)(self._sorted_rows)

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
        if sum(box.numel for box in boxes) > tensor.rows * tensor.cols:
            boxes = _refined(boxes)
        for pieces in boxes.values():
            pieces.sort(key=lambda piece: piece.replica)
        return dict(sorted(boxes.items(), key=lambda item: (item[0].row, item[0].col)))

    def overlapping(self, tensor: Tensor, box: Box) -> Iterator[tuple[Box, list[Piece]]]:
        """The parts of `box` that the tensor's boxes hold, by row, with the pieces of each such box by replica."""
        boxes = self._expand(tensor)
        rows, held, tallest = self._rows(tensor)
        for number in range(bisect_left(rows, box.row - tallest + 1), bisect_left(rows, box.row + box.rows)):
            if part := held[number].intersect(box):
                yield part, boxes[held[number]]

    def _sorted_rows(self, tensor: Tensor) -> tuple[list[int], list[Box], int]:
        boxes = list(self._expand(tensor))
        return [box.row for box in boxes], boxes, max(box.rows for box in boxes)


def _refined(boxes: dict[Box, list[Piece]]) -> dict[Box, list[Piece]]:
    """The same pieces, cut where any of them ends: copies that files cut at different elements come to have equal boxes."""
    refined: dict[Box, list[Piece]] = {}
    rows = sorted({edge for box in boxes for edge in (box.row, box.row + box.rows)})
    for piece in (piece for pieces in boxes.values() for piece in pieces):
        box = piece.box
        for low, high in pairwise(edge for edge in rows if box.row <= edge <= box.row + box.rows):
            cols = {edge for other in boxes if other.row < high and low < other.row + other.rows
                    for edge in (other.col, other.col + other.cols) if box.col <= edge <= box.col + box.cols}
            for left, right in pairwise(sorted(cols)):
                part = Box(low, high - low, left, right - left)
                refined.setdefault(part, []).append(
                    replace(piece, box=part, offset=piece.offset_of(low, left), stride=piece.pitch))
    return refined


def replica_of(held: Held, layout: Layout) -> int:
    """A number for who holds it, among those that may keep copies of one box: the word embedding's own ranks, then
    its copies at the head; each by expert- and tensor-parallel place."""
    return (held.is_tied_head * layout.ep + held.found.place.ep) * layout.tp + held.found.place.tp


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
                same = self.holders.setdefault(first, [])
                if same and same[0].transposed != held.transposed:
                    raise RefusedError(f"{held.found.where}: {tensor.name} ({tensor.role}) lies transposed here or in "
                                       f"{same[0].found.where}, and not in both; these files are of different runs")
                same.append(held)
        if self.boxes is None:
            self.boxes = Boxes(self.holders, self.layout)

    def check_complete(self) -> None:
        """Refuse unless the pieces of every logical tensor cover each of its elements exactly once."""
        for tensor, boxes in self.boxes.items():
            if not covers_once(list(boxes), tensor.rows, tensor.cols):
                files = sorted({piece.file for pieces in boxes.values() for piece in pieces})
                raise RefusedError(f"{files[0]}: the pieces of {tensor.name} ({tensor.role}) found in {len(files)} files "
                                   f"do not make up its shape {list(tensor.shape)} exactly once; a rank is missing")

    def is_transposed(self, tensor: Tensor) -> bool:
        """Whether all that hold it hold its transpose."""
        return tensor in self.holders and self.holders[tensor][0].transposed

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
    if sum(box.numel for box in boxes) != rows * cols:
        return False
    counts = _counts(boxes, rows, cols)
    return counts is not None and bool((counts == 1).all())


def covers(boxes: list[Box], rows: int, cols: int) -> bool:
    """Whether the boxes, which may overlap, leave no element of a matrix of rows × cols out."""
    counts = _counts(boxes, rows, cols)
    return counts is not None and bool(counts.all())


def _counts(boxes: list[Box], rows: int, cols: int) -> np.ndarray | None:
    """How many boxes hold each cell of the grid that all their edges make; None if some box reaches outside."""
    row_edges = sorted({0, rows, *(b.row for b in boxes), *(b.row + b.rows for b in boxes)})
    col_edges = sorted({0, cols, *(b.col for b in boxes), *(b.col + b.cols for b in boxes)})
    if row_edges[-1] > rows or col_edges[-1] > cols:
        return None
    row_at, col_at = ({edge: k for k, edge in enumerate(edges)} for edges in (row_edges, col_edges))
    count = np.zeros((len(row_edges) - 1, len(col_edges) - 1), np.int32)
    for b in boxes:
        count[row_at[b.row]:row_at[b.row + b.rows], col_at[b.col]:col_at[b.col + b.cols]] += 1
    return count
