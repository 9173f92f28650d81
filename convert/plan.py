"""The plan: which bytes of the source make up which bytes of each output file. Interval arithmetic, no data.

A plan is a value. It proves, before anything is copied, that each output element is written exactly once and that each
source element is used or named as dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .containers.frames import Hole, Segment
from .errors import RefusedError
from .index import Held, Index, replica_of
from .layout import Place
from .tensors import ITEMSIZE, Box, Piece, Stored, Tensor, TensorSpec


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor that an output file should hold: its spec and the boxes of logical tensors that make it up, in order.

    A box without a tensor is a gap, filled with zeros. `source` stands instead of boxes for a tensor that is
    copied as it is and is no part of the training state.
    """

    spec: TensorSpec
    blocks: tuple[tuple[Tensor | None, Box], ...] = ()
    source: Stored | None = None


@dataclass(frozen=True, slots=True)
class WantedFile:
    """An output file: where it goes, how its container frames it, what it holds, and the rank whose copies it prefers."""

    path: str
    segments: tuple[Segment, ...]
    tensors: tuple[Wanted, ...]
    place: Place = Place()


@dataclass(frozen=True, slots=True)
class Output:
    """What a framework's writer asks for: the files, each rank's source folder with its file or folder in the output, the
    links to make (link, existing file), and what is worth saying in the manifest."""

    files: list[WantedFile]
    converted: list[tuple[Path, str]]
    links: list[tuple[str, str]]
    notes: dict[str, object]


@dataclass(frozen=True, slots=True)
class Twin:
    """Where the elements of a copy are repeated in less precision, row-major and contiguous."""

    file: str
    offset: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Copy:
    """`numel` consecutive elements from byte `offset` of `file`, or zeros if that is ''; they come next in their tensor.

    `blocks` are what they are of which logical tensors, in order. `replica` numbers the copies that ranks keep of one box;
    `counted` marks the one use of each source element that enters its digest. `twin` is to be compared on the way.
    """

    file: str
    offset: int
    numel: int
    dtype: str
    blocks: tuple[tuple[Tensor, Box], ...] = ()
    replica: int = 0
    counted: bool = False
    twin: Twin | None = None

    def is_followed_by(self, other: Copy) -> bool:
        """Whether `other` goes on where this one ends, at the source and at the twin, and is treated alike."""
        nbytes = self.numel * ITEMSIZE[self.dtype]
        alike = (self.file, self.offset + nbytes, self.dtype, self.replica, self.counted, bool(self.blocks)) == (
            other.file, other.offset, other.dtype, other.replica, other.counted, bool(other.blocks))
        if self.twin is None or other.twin is None:
            return alike and self.twin is other.twin
        twin_end = self.twin.offset + self.numel * ITEMSIZE[self.twin.dtype]
        return alike and (self.twin.file, twin_end, self.twin.dtype) == (
            other.twin.file, other.twin.offset, other.twin.dtype)


@dataclass(frozen=True, slots=True)
class FileTask:
    """Everything one worker needs to write one output file; `copies[i]` fill tensor i in order."""

    path: str
    segments: tuple[Segment, ...]
    specs: tuple[TensorSpec, ...]
    copies: tuple[tuple[Copy, ...], ...]

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments)

    @property
    def streamed(self) -> int:
        """The bytes that come from the source, after any cast."""
        return sum(segment.nbytes for segment in self.segments if isinstance(segment, Hole))

    @property
    def bytes_read(self) -> int:
        return sum(c.numel * ITEMSIZE[c.dtype] for copies in self.copies for c in copies)


@dataclass(slots=True)
class Plan:
    tasks: list[FileTask]
    unused: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(task.nbytes for task in self.tasks)


@dataclass(slots=True)
class Planner:
    """Plans the wanted files over one source index. `twins` maps a role to the role that repeats it in less precision."""

    index: Index
    twins: dict[str, str] = field(default_factory=dict)
    _used: set[int] = field(default_factory=set)
    _cut: set[tuple[Tensor, Box, int]] = field(default_factory=set)
    _twin_tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roles = set(self.twins.values())
        self._twin_tensors = {(t.role, t.name): t for t in self.index.boxes if t.role in roles}

    def plan(self, files: list[WantedFile]) -> Plan:
        tasks = [FileTask(file.path, file.segments, tuple(w.spec for w in file.tensors),
                          tuple(tuple(self._copies(w, file.place)) for w in file.tensors)) for file in files]
        return Plan(tasks, self._unused())

    def _copies(self, wanted: Wanted, place: Place) -> list[Copy]:
        spec = wanted.spec
        if wanted.source is not None:
            itemsize = ITEMSIZE[wanted.source.dtype]
            return [Copy(e.file, e.offset, e.nbytes // itemsize, wanted.source.dtype) for e in wanted.source.extents]
        if spec.data is not None:
            return []
        copies = list(_merged(self._pieces(wanted, place), wanted.blocks))
        if sum(copy.numel for copy in copies) != math.prod(spec.shape):
            raise RefusedError(f"{spec.name}: {sum(c.numel for c in copies)} source elements for shape {list(spec.shape)}")
        return copies

    def _pieces(self, wanted: Wanted, place: Place) -> Iterator[Copy]:
        """Copies for the blocks in order; those that a tensor of the source holds just so become one."""
        blocks, position = wanted.blocks, 0
        while position < len(blocks):
            tensor, box = blocks[position]
            if tensor is None:
                yield Copy("", 0, box.numel, wanted.spec.dtype)
                position += 1
            elif same := self._holding(blocks, position):
                yield self._whole(same, place)
                position += len(same[0].blocks)
            else:
                yield from self._block(tensor, box, place)
                position += 1

    def _holding(self, blocks: tuple[tuple[Tensor | None, Box], ...], position: int) -> list[Held]:
        """The replicas of a tensor of the source that is the blocks from `position` on, in one extent."""
        return [held for held in self.index.holders.get(blocks[position][0], ())
                if held.blocks[0] == blocks[position] and len(held.found.stored.extents) == 1
                and held.blocks == blocks[position:position + len(held.blocks)]]

    def _whole(self, same: list[Held], place: Place) -> Copy:
        held = self._preferred(same, place, self._replica)
        replica = sorted(map(self._replica, same)).index(self._replica(held))
        counted = id(held) not in self._used
        self._used.add(id(held))
        stored = held.found.stored
        extent, = stored.extents
        return Copy(extent.file, extent.offset, stored.numel, stored.dtype, held.blocks, replica, counted,
                    self._whole_twin(held, place))

    def _whole_twin(self, held: Held, place: Place) -> Twin | None:
        tensor = held.blocks[0][0]
        twin = self._twin_tensors.get((self.twins.get(tensor.role), tensor.name))
        boxes = [box for _, box in held.blocks]
        same = [other for other in self.index.holders.get(twin, ()) if [box for _, box in other.blocks] == boxes]
        if not same:
            return None
        stored = self._preferred(same, place, self._replica).found.stored
        return Twin(stored.extents[0].file, stored.extents[0].offset, stored.dtype)

    def _replica(self, held: Held) -> int:
        return replica_of(held, self.index.layout)

    def _block(self, tensor: Tensor, box: Box, place: Place) -> list[Copy]:
        """Copies that fill `box` of `tensor`, row-major."""
        boxes = self.index.boxes.get(tensor)
        if boxes is None:
            raise RefusedError(f"{tensor.name} ({tensor.role}) is not in the source")
        parts = []
        for pieces in boxes.values():
            part = pieces[0].box.intersect(box)
            if part:
                parts.append((part, self._preferred(pieces, place, lambda piece: piece.replica)))
        parts.sort(key=lambda pair: (pair[0].row, pair[0].col))
        if sum(part.numel for part, _ in parts) != box.numel:
            raise RefusedError(f"{tensor.name} ({tensor.role}): the source does not hold {box}")
        for part, piece in parts:
            if part.rows > 1 and not part.cols == piece.box.cols == box.cols:
                raise RefusedError(f"{tensor.name}: this change of layout needs its columns cut, which is not built yet")
        return [self._copy(piece, part) for part, piece in parts]

    def _preferred(self, copies: list, place: Place, replica: Callable[[Any], int]) -> Any:
        """The rank's own copy if there is one, else one of its tensor-parallel rank, else the first."""
        tp, own = self.index.layout.tp, place.ep * self.index.layout.tp + place.tp
        return min(copies, key=lambda copy: (replica(copy) != own, replica(copy) % tp != place.tp, replica(copy)))

    def _copy(self, piece: Piece, box: Box) -> Copy:
        """A part of a piece. It is not compared with its twin: whole tensors are, in the layout they were saved in."""
        tensor = piece.tensor
        start = (box.row - piece.box.row) * piece.box.cols + box.col - piece.box.col
        replica = sorted(p.replica for p in self.index.boxes[tensor][piece.box]).index(piece.replica)
        counted = (tensor, box, replica) not in self._cut
        self._cut.add((tensor, box, replica))
        return Copy(piece.file, piece.offset + start * ITEMSIZE[tensor.dtype], box.numel, tensor.dtype, ((tensor, box),),
                    replica, counted)

    def _unused(self) -> list[str]:
        """Names of the source tensors of which some box goes nowhere (replicas kept elsewhere do not count)."""
        repeated, cut = set(self.twins.values()), {tensor for tensor, _, _ in self._cut}
        return sorted({f"{tensor.name} ({tensor.role})" for tensor, holders in self.index.holders.items()
                       if tensor.role not in repeated and tensor not in cut and not self._all_used(tensor, holders)})

    def _all_used(self, tensor: Tensor, holders: list[Held]) -> bool:
        boxes = [[box for owner, box in held.blocks if owner == tensor] for held in holders]
        used = {box for held, own in zip(holders, boxes, strict=True) if id(held) in self._used for box in own}
        return all(box in used for own in boxes for box in own)


def _merged(copies: Iterable[Copy], blocks: tuple[tuple[Tensor | None, Box], ...]) -> Iterator[Copy]:
    """The copies with those that follow each other at the source made one; `blocks` is shared where it is all of them."""
    run: list[Copy] = []
    for copy in copies:
        if run and not run[-1].is_followed_by(copy):
            yield _joined(run, blocks)
            run = []
        run.append(copy)
    if run:
        yield _joined(run, blocks)


def _joined(run: list[Copy], blocks: tuple[tuple[Tensor | None, Box], ...]) -> Copy:
    if len(run) == 1:
        return run[0]
    own = tuple(block for copy in run for block in copy.blocks)
    return replace(run[0], numel=sum(copy.numel for copy in run), blocks=blocks if own == blocks else own)
