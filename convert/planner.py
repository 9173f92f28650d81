"""Planning: from the boxes that output files want and those that a source holds to runs of bytes. Interval arithmetic.

It proves, before anything is copied, that each output element is written exactly once and that each source element is
used or named as left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import RefusedError
from .fusion import PADDING
from .index import Held, Index, covers, is_padding, replica_of
from .layout import Place
from .plan import Copy, FileTask, Plan, Transpose, Twin, Wanted, WantedFile, Weave
from .tensors import ITEMSIZE, Box, Piece, Tensor

#: what can be made of the copies that several ranks keep
OWN, REFUSE, FIRST, MEAN = "own", "refuse", "first", "mean"


@dataclass(slots=True)
class Planner:
    """Plans the wanted files over one source index. `twins` maps a role to the role that repeats it in less precision.

    `replicas` says what becomes of a box that several ranks keep: OWN, each takes its own copy; else all take the first
    rank's, with which the others are compared, or, for MEAN, the mean of them all.
    """

    index: Index
    twins: dict[str, str] = field(default_factory=dict)
    replicas: str = OWN
    _used: dict[Tensor, set[Box]] = field(default_factory=dict)
    _counted: set = field(default_factory=set)
    _alike: dict[tuple[Tensor, Box], list[list[Held]]] = field(default_factory=dict)
    _tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tensors = {(tensor.role, tensor.name): tensor for tensor in self.index.boxes}

    def plan(self, files: list[WantedFile]) -> Plan:
        tasks = [FileTask(file.path, file.segments, tuple(w.spec for w in file.tensors),
                          tuple(tuple(self._copies(w, file.place or Place())) for w in file.tensors)) for file in files]
        return Plan(tasks, self._unused())

    def _copies(self, wanted: Wanted, place: Place) -> list[Copy | Weave | Transpose]:
        spec = wanted.spec
        if wanted.source is not None:
            itemsize = ITEMSIZE[wanted.source.dtype]
            return [Copy(e.file, e.offset, e.nbytes // itemsize, wanted.source.dtype) for e in wanted.source.extents]
        if spec.data is not None:
            return []
        pieces = self._transposed if wanted.transposed else self._pieces
        copies = list(_merged(pieces(wanted, place), wanted.blocks))
        if sum(copy.numel for copy in copies) != math.prod(spec.shape):
            raise RefusedError(f"{spec.name}: {sum(c.numel for c in copies)} source elements for shape {list(spec.shape)}")
        return copies

    def _transposed(self, wanted: Wanted, place: Place) -> Iterator[Copy | Weave | Transpose]:
        """Copies for a tensor that is to be written transposed; one that lies so is copied as it is, blocks side by side."""
        abreast = max(wanted.bands, default=1)
        if not self._is_turned(wanted.blocks):
            yield self._transpose(wanted.blocks, abreast, place)
        elif abreast > 1:
            raise RefusedError(f"{wanted.spec.name}: its parts lie transposed in the source, side by side, and cannot be "
                               "interleaved; convert to another target first")
        else:
            yield from self._band(wanted.blocks, place)

    def _pieces(self, wanted: Wanted, place: Place) -> Iterator[Copy | Weave | Transpose]:
        """Copies for the blocks in order; those that a tensor of the source holds just so become one."""
        blocks, bands, position, number = wanted.blocks, wanted.bands, 0, 0
        while position < len(blocks):
            tensor, box = blocks[position]
            count = bands[number] if bands else 1
            if tensor is None:
                yield Copy("", 0, box.numel, wanted.spec.dtype)
            elif count == 1 and (same := self._holding(blocks, position)):
                yield self._whole(same, place)
                position, number = position + len(same[0].blocks), number + len(same[0].blocks)
                continue
            else:
                fill = self._padding if is_padding(tensor) else self._filled
                yield from fill(blocks[position:position + count], place)
            position, number = position + count, number + 1

    # ------------------------------------------------------------------------------- what a tensor of the source holds

    def _holding(self, blocks: tuple[tuple[Tensor | None, Box], ...], position: int) -> list[Held]:
        """The replicas, in order, of a tensor of the source that is the blocks from `position` on, one after the other and
        in one extent."""
        is_repeated = self._repeat_of(blocks[position][0]) is not None
        for same in self._held_from(*blocks[position]):
            held = same[0]
            if (held.abreast == 1 and not held.transposed and held.blocks == blocks[position:position + len(held.blocks)]
                    and (not is_repeated or self._twins(held))):
                return same
        return []

    def _held_from(self, tensor: Tensor, box: Box) -> list[list[Held]]:
        """The tensors of the source whose first block is this one, replicas together."""
        if (tensor, box) not in self._alike:
            groups: dict[tuple, list[Held]] = {}
            for held in self.index.holders.get(tensor, ()):
                if held.blocks[0] == (tensor, box) and len(held.found.stored.extents) == 1:
                    groups.setdefault((held.blocks, held.abreast), []).append(held)
            self._alike[tensor, box] = [sorted(same, key=self._replica) for same in groups.values()]
        return self._alike[tensor, box]

    def _whole(self, same: list[Held], place: Place) -> Copy:
        taken = self._preferred(same, place, self._replica)
        stored = taken.found.stored
        extent, = stored.extents
        for tensor, box in taken.blocks:
            self._used.setdefault(tensor, set()).add(box)
        return Copy(extent.file, extent.offset, stored.numel, stored.dtype, taken.blocks,
                    **self._reckoned(taken.blocks[0], same, taken, _begin), twin=self._whole_twin(taken, place))

    def _whole_twin(self, held: Held, place: Place) -> Twin | None:
        same = self._twins(held)
        return _begin(self._preferred(same, place, self._replica)) if same else None

    def _twins(self, held: Held) -> list[Held]:
        """The replicas of the tensor of the source that repeats all of this one in the same order."""
        tensor, first = held.blocks[0]
        twin, boxes = self._repeat_of(tensor), [box for _, box in held.blocks]
        for same in self._held_from(twin, first) if twin else ():
            if ((same[0].abreast, same[0].transposed) == (held.abreast, held.transposed)
                    and [box for _, box in same[0].blocks] == boxes):
                return same
        return []

    def _repeat_of(self, tensor: Tensor) -> Tensor | None:
        """The tensor that repeats this one in less precision."""
        return self._tensors.get((self.twins.get(tensor.role), tensor.name))

    # -------------------------------------------------------------------------------- what has to be cut and put together

    def _filled(self, blocks: tuple[tuple[Tensor, Box], ...], place: Place) -> Iterator[Copy | Weave | Transpose]:
        """Copies that fill blocks which lie side by side; row-major."""
        if self._is_turned(blocks):
            yield self._transpose(blocks, 1, place)
        else:
            yield from self._band(blocks, place)

    def _is_turned(self, blocks: tuple[tuple[Tensor, Box], ...]) -> bool:
        """Whether blocks that make up one tensor lie transposed in the source."""
        turned = {self.index.is_transposed(self._known(tensor.role, tensor.name)): tensor.name for tensor, _ in blocks}
        if len(turned) > 1:
            raise RefusedError(f"{turned[True]} lies transposed in the source and {turned[False]} does not; one tensor "
                               "cannot be made of both")
        return True in turned

    def _band(self, blocks: tuple[tuple[Tensor, Box], ...], place: Place) -> Iterator[Copy | Weave]:
        """Copies that fill blocks which lie side by side, as they lie in the source; row-major."""
        columns = [self._parts(tensor, box) for tensor, box in blocks]
        if len(columns) == 1 and len({(part.col, part.cols) for part, _ in columns[0]}) == 1:
            panels = [[self._copy(part, pieces, place)] for part, pieces in columns[0]]
        else:
            panels = [_joined_beside([self._copy(part, pieces, place) for part, pieces in beside])
                      for beside in _beside(columns)]
        for beside in panels:
            woven = any(copy.pitch for copy in beside) or (len(beside) > 1 and beside[0].numel > beside[0].cols)
            yield from [Weave(tuple(beside))] if woven else beside

    def _transpose(self, blocks: tuple[tuple[Tensor, Box], ...], abreast: int, place: Place) -> Transpose:
        """The blocks, as they lie in the source, in bands of equally many, the bands one below the other, each of a band's
        blocks in its own panel."""
        panels, rows, wide = [], 0, {self._lying(*block).cols for block in blocks}
        if len(wide) > 1:
            raise RefusedError(f"{blocks[0][0].name}: is to be transposed with blocks of other widths: {sorted(wide)}")
        for number in range(abreast):
            rows, panel = 0, []
            for tensor, box in blocks[number::abreast]:
                lying = self._lying(tensor, box)
                for part, pieces in self._parts(tensor, box):
                    copy = self._copy(part, pieces, place)
                    there = Box(rows + part.row - lying.row, part.rows, part.col - lying.col, part.cols)
                    panel.append(((there,), replace(copy, pitch=copy.pitch or part.cols)))
                rows += lying.rows
            panels.append(tuple(panel))
        return Transpose(tuple(panels), rows, *wide)

    def _lying(self, tensor: Tensor, box: Box) -> Box:
        """A box as it lies in the source."""
        return box.flipped() if self.index.is_transposed(tensor) else box

    def _padding(self, blocks: tuple[tuple[Tensor, Box], ...], place: Place) -> Iterator[Copy | Weave | Transpose]:
        """Rows of a vocabulary's padding: the source's as far as they go, then copies of its last row (as Megatron-LM's
        tools/checkpoint pads, core_r0.6.0 … 0.16)."""
        (wanted, box), = blocks
        padding = self._tensors.get((wanted.role, wanted.name))
        kept = max(min(box.rows, (padding.rows if padding else 0) - box.row), 0)
        if kept:
            yield from self._filled(((padding, Box(box.row, kept, 0, box.cols)),), place)
        last = padding or self._known(wanted.role, wanted.name.removesuffix(f".{PADDING}"))
        row = self._parts(last, Box(last.rows - 1, 1, 0, last.cols)) if kept < box.rows else []
        for _ in range(kept, box.rows):
            yield from (self._again(last, part, self._preferred(pieces, place, _replica_of_piece)) for part, pieces in row)

    def _again(self, tensor: Tensor, part: Box, piece: Piece) -> Copy | Transpose:
        """A part of one row that is taken once more, and enters no digest."""
        box = piece.turned(part)
        copy = Copy(piece.file, piece.offset_of(box.row, box.col), part.numel, tensor.dtype, ((tensor, part),),
                    turned=piece.transposed)
        if not piece.transposed:
            return copy
        return Transpose(((((Box(0, part.rows, 0, 1),), replace(copy, pitch=piece.pitch)),),), part.rows, 1)

    def _known(self, role: str, name: str) -> Tensor:
        if (role, name) not in self._tensors:
            raise RefusedError(f"{name} ({role}) is not in the source")
        return self._tensors[role, name]

    def _parts(self, tensor: Tensor, box: Box) -> list[tuple[Box, list[Piece]]]:
        """The boxes of the source, cut where those of its twin end, that make up `box` of `tensor`: as they lie there, by
        row and column."""
        if self._known(tensor.role, tensor.name) != tensor:
            raise RefusedError(f"{tensor.name} ({tensor.role}) is {self._known(tensor.role, tensor.name)} in the source")
        parts = list(self.index.boxes.overlapping(tensor, box))
        if twin := self._repeat_of(tensor):
            parts = [(low, pieces) for part, pieces in parts for low, _ in self.index.boxes.overlapping(twin, part)]
        if sum(part.numel for part, _ in parts) != box.numel:
            raise RefusedError(f"{tensor.name} ({tensor.role}): the source does not hold {box}")
        self._used.setdefault(tensor, set()).add(box)
        if self.index.is_transposed(tensor):
            return sorted(((part.flipped(), pieces) for part, pieces in parts), key=lambda one: (one[0].row, one[0].col))
        return parts

    def _copy(self, part: Box, pieces: list[Piece], place: Place) -> Copy:
        """A part, as it lies there, of the box that all the pieces hold."""
        taken = self._preferred(pieces, place, _replica_of_piece)
        tensor, box = taken.tensor, taken.turned(part)
        return Copy(taken.file, taken.offset_of(box.row, box.col), part.numel, tensor.dtype, ((tensor, part),),
                    **self._reckoned((tensor, part), pieces, taken, lambda piece: _at(piece, box)),
                    twin=self._twin(taken, box, place), pitch=_pitch(taken, box), turned=taken.transposed)

    def _twin(self, taken: Piece, box: Box, place: Place) -> Twin | None:
        twin = self._repeat_of(taken.tensor)
        _, same = next(self.index.boxes.overlapping(twin, box)) if twin else (None, ())
        if not same:
            return None
        piece = self._preferred(same, place, _replica_of_piece)
        turned = piece.transposed != taken.transposed
        return replace(_at(piece, box), turned=turned, pitch=piece.pitch if turned else _pitch(piece, box))

    # ------------------------------------------------------------------------------------------------- replicas and proof

    def _replica(self, held: Held) -> int:
        return replica_of(held, self.index.layout)

    def _preferred(self, copies: list, place: Place, replica: Callable[[Any], int]) -> Any:
        """Of replicas in order, that one which is to be taken: the first where all take one; else the rank's own if there
        is one, else one of its tensor-parallel rank, else the first."""
        if self.replicas != OWN or len(copies) == 1:
            return copies[0]
        tp, own = self.index.layout.tp, place.ep * self.index.layout.tp + place.tp
        return min(copies, key=lambda copy: (replica(copy) != own, replica(copy) % tp != place.tp))

    def _reckoned(self, block: tuple[Tensor, Box], copies: list, taken: Any, begin: Callable[[Any], Twin]) -> dict[str, Any]:
        """What a copy says of its replica: its number among all of the block, counted from 0; whether this is its first
        use, which enters the digest; and with which others it is compared, there or wherever their mean is taken."""
        replica = next(number for number, copy in enumerate(copies) if copy is taken)
        key = *block, replica
        counted, mean = key not in self._counted, self.replicas == MEAN
        self._counted.add(key)
        compared = mean or (counted and self.replicas != OWN)
        return {"replica": replica, "counted": counted, "mean": mean,
                "others": tuple(begin(copy) for copy in copies if copy is not taken) if compared else ()}

    def _unused(self) -> list[str]:
        """Names of the source tensors of which some box goes nowhere (replicas kept elsewhere do not count)."""
        repeated = set(self.twins.values())
        return sorted(f"{tensor.name} ({tensor.role})" for tensor in self.index.boxes if tensor.role not in repeated
                      and not covers(list(self._used.get(tensor, ())), tensor.rows, tensor.cols))


def _beside(columns: list[list[tuple[Box, list[Piece]]]]) -> Iterator[list[tuple[Box, list[Piece]]]]:
    """The parts of columns, cut wherever one of them begins or ends, by runs of rows: what lies side by side in each."""
    edges = sorted({edge for parts in columns for part, _ in parts for edge in (part.row, part.row + part.rows)})
    number = {edge: place for place, edge in enumerate(edges)}
    runs: list[list] = [[] for _ in edges[1:]]
    for column, parts in enumerate(columns):
        for part, pieces in parts:
            for place in range(number[part.row], number[part.row + part.rows]):
                low, high = edges[place], edges[place + 1]
                runs[place].append((column, part.col, Box(low, high - low, part.col, part.cols), pieces))
    for run in runs:
        yield [(part, pieces) for _, _, part, pieces in sorted(run, key=lambda one: one[:2])]


def _replica_of_piece(piece: Piece) -> int:
    return piece.replica


def _begin(held: Held) -> Twin:
    """Where a tensor of the source begins."""
    stored = held.found.stored
    return Twin(stored.extents[0].file, stored.extents[0].offset, stored.dtype)


def _at(piece: Piece, box: Box) -> Twin:
    """Where a box of a piece begins."""
    return Twin(piece.file, piece.offset_of(box.row, box.col), piece.tensor.dtype, _pitch(piece, box))


def _pitch(piece: Piece, box: Box) -> int:
    """The elements between the rows of a box of a piece, as it lies there; 0 where they follow each other."""
    part = piece.turned(box)
    return piece.pitch if part.rows > 1 and piece.pitch != part.cols else 0


def _merged(copies: Iterable[Copy | Weave | Transpose],
            blocks: tuple[tuple[Tensor | None, Box], ...]) -> Iterator[Copy | Weave | Transpose]:
    """The copies with those that follow each other at the source made one, and so those of which each is a Transpose;
    `blocks` is shared where it is all of them."""
    for run in _runs(copies, lambda one, other: one.is_followed_by(other)):
        yield _side_by_side(run) if isinstance(run[0], Transpose) else _joined(run, blocks)


def _side_by_side(run: list[Transpose]) -> Transpose:
    """One of several whose panels lie side by side."""
    panels: list[list[tuple[Box, Copy]]] = [[] for _ in run[0].panels]
    col = 0
    for one in run:
        for panel, mine in zip(panels, one.panels, strict=True):
            panel += [(replace(place, col=place.col + col), copy) for (place,), copy in mine]
        col += one.cols
    return Transpose(tuple(tuple(_scattered(panel)) for panel in panels), run[0].rows, col)


def _scattered(panel: list[tuple[Box, Copy]]) -> Iterator[tuple[tuple[Box, ...], Copy]]:
    """The copies of a panel, each with its places: those that lie side by side at the source made one."""
    lying = sorted(panel, key=lambda one: (one[1].file, one[1].offset))
    for run in _runs(lying, lambda one, other: one[0].row == other[0].row and one[1].is_beside(other[1])):
        places, copies = zip(*run, strict=True)
        blocks = _widened(block for copy in copies for block in copy.blocks)
        yield places, replace(copies[0], numel=sum(copy.numel for copy in copies), blocks=tuple(blocks))


def _widened(blocks: Iterable[tuple[Tensor, Box]]) -> Iterator[tuple[Tensor, Box]]:
    """Blocks of equally many rows, side by side, with those that lie so in their tensor made one."""
    def goes_on(one: tuple[Tensor, Box], other: tuple[Tensor, Box]) -> bool:
        (tensor, box), (its, next_box) = one, other
        return (tensor, box.row, box.col + box.cols) == (its, next_box.row, next_box.col)

    for run in _runs(blocks, goes_on):
        tensor, box = run[0]
        yield tensor, replace(box, cols=sum(box.cols for _, box in run))


def _joined_beside(copies: list[Copy]) -> list[Copy]:
    """Copies that lie side by side in their tensor, with those that do so at the source made one."""
    return [_joined(run, ()) for run in _runs(copies, lambda one, other: bool(one.pitch) and one.is_beside(other))]


def _runs(copies: Iterable[Any], goes_on: Callable[[Any, Any], bool]) -> Iterator[list[Any]]:
    """The copies in runs in which each goes on in the next."""
    run: list[Any] = []
    for copy in copies:
        if run and not goes_on(run[-1], copy):
            yield run
            run = []
        run.append(copy)
    if run:
        yield run


def _joined(run: list[Copy], blocks: tuple[tuple[Tensor | None, Box], ...]) -> Any:
    """One copy for a run of copies; what else is a run of its own is left as it is."""
    if len(run) == 1:
        return run[0]
    own = tuple(block for copy in run for block in copy.blocks)
    return replace(run[0], numel=sum(copy.numel for copy in run), blocks=blocks if own == blocks else own)
