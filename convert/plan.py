"""The plan: which bytes of the source make up which bytes of each output file. Interval arithmetic, no data.

A plan is a value. It proves, before anything is copied, that each output element is written exactly once and that each
source element is used or named as dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from .containers.frames import Hole, Segment
from .errors import RefusedError
from .index import Index
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
    _used: set[int | tuple[int, Box]] = field(default_factory=set)
    _twin_boxes: dict[tuple[str, str], dict[Box, list[Piece]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roles = set(self.twins.values())
        self._twin_boxes = {(t.role, t.name): boxes for t, boxes in self.index.boxes.items() if t.role in roles}

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
        copies = list(_merged((copy for tensor, box in wanted.blocks for copy in (
            [Copy("", 0, box.numel, spec.dtype)] if tensor is None else self._block(tensor, box, place))), wanted.blocks))
        if sum(copy.numel for copy in copies) != math.prod(spec.shape):
            raise RefusedError(f"{spec.name}: {sum(c.numel for c in copies)} source elements for shape {list(spec.shape)}")
        return copies

    def _block(self, tensor: Tensor, box: Box, place: Place) -> list[Copy]:
        """Copies that fill `box` of `tensor`, row-major."""
        boxes = self.index.boxes.get(tensor)
        if boxes is None:
            raise RefusedError(f"{tensor.name} ({tensor.role}) is not in the source")
        exact = boxes.get(box)
        if exact:
            return [self._copy(self._preferred(exact, place), box, place)]
        parts = []
        for pieces in boxes.values():
            part = pieces[0].box.intersect(box)
            if part:
                parts.append((part, self._preferred(pieces, place)))
        parts.sort(key=lambda pair: (pair[0].row, pair[0].col))
        if sum(part.numel for part, _ in parts) != box.numel:
            raise RefusedError(f"{tensor.name} ({tensor.role}): the source does not hold {box}")
        for part, piece in parts:
            if part.rows > 1 and not part.cols == piece.box.cols == box.cols:
                raise RefusedError(f"{tensor.name}: this change of layout needs its columns cut, which is not built yet")
        return [self._copy(piece, part, place) for part, piece in parts]

    def _preferred(self, pieces: list[Piece], place: Place) -> Piece:
        """The rank's own copy if there is one, else one of its tensor-parallel rank, else the first."""
        tp, own = self.index.layout.tp, place.ep * self.index.layout.tp + place.tp
        return min(pieces, key=lambda p: (p.replica != own, p.replica % tp != place.tp, p.replica))

    def _copy(self, piece: Piece, box: Box, place: Place) -> Copy:
        tensor = piece.tensor
        start = (box.row - piece.box.row) * piece.box.cols + box.col - piece.box.col
        replica = sorted(p.replica for p in self.index.boxes[tensor][piece.box]).index(piece.replica)
        use = id(piece) if box == piece.box else (id(piece), box)
        counted = use not in self._used
        self._used.add(use)
        twins = self._twin_boxes.get((self.twins.get(tensor.role), tensor.name), {}).get(box)
        twin = self._preferred(twins, place) if twins else None
        return Copy(piece.file, piece.offset + start * ITEMSIZE[tensor.dtype], box.numel, tensor.dtype, ((tensor, box),),
                    replica, counted, twin and Twin(twin.file, twin.offset, twin.tensor.dtype))

    def _unused(self) -> list[str]:
        """Names of the source tensors of which some box goes nowhere (replicas kept elsewhere do not count)."""
        used = {use if isinstance(use, int) else use[0] for use in self._used}
        repeated = set(self.twins.values())
        return sorted({f"{tensor.name} ({tensor.role})" for tensor, boxes in self.index.boxes.items()
                       if tensor.role not in repeated for pieces in boxes.values()
                       if not any(id(piece) in used for piece in pieces)})


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
