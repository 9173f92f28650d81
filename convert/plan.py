"""The plan: which bytes of the source make up which bytes of each output file. A value; planner.py makes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from .containers.frames import Hole, Segment
from .layout import Place
from .tensors import EXP_AVG, EXP_AVG_SQ, ITEMSIZE, WEIGHT, Box, Stored, Tensor, TensorSpec


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor that an output file should hold: its spec and the boxes of logical tensors that make it up, in order.

    A box without a tensor is a gap, filled with zeros. `bands` says how many boxes at a time have their rows side by side,
    band by band; empty: each box for itself. `source` stands instead of boxes for a tensor that is copied as it is and is
    no part of the training state. A `transposed` tensor is the transpose of what its boxes make up, in which the boxes of
    a band are interleaved (see Transpose).
    """

    spec: TensorSpec
    blocks: tuple[tuple[Tensor | None, Box], ...] = ()
    source: Stored | None = None
    bands: tuple[int, ...] = ()
    transposed: bool = False


def bands_of(blocks: tuple, abreast: int) -> tuple[int, ...]:
    """The bands of a tensor of which `abreast` blocks at a time lie side by side."""
    return (abreast,) * (len(blocks) // abreast) if abreast > 1 else ()


@dataclass(frozen=True, slots=True)
class WantedFile:
    """An output file: where it goes, how its container frames it, what it holds, and the rank whose file it is (None: all
    ranks'). One that `completes` the output is written when all others are there."""

    path: str
    segments: tuple[Segment, ...]
    tensors: tuple[Wanted, ...]
    place: Place | None = None
    completes: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """What a framework's writer asks for: the files, each rank's source folder with its file or folder in the output, the
    links to make (link, existing file), and what is worth saying in the manifest. `roles` are the states that it has room
    for, `needless` the names of tensors that no model computes with, and `extra_states` those that are kept, by name and
    place."""

    files: list[WantedFile]
    converted: list[tuple[Path, str]]
    links: list[tuple[str, str]]
    notes: dict[str, object]
    roles: tuple[str, ...] = (WEIGHT, EXP_AVG, EXP_AVG_SQ)
    needless: frozenset[str] = frozenset()
    extra_states: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Twin:
    """Where the elements of a copy are repeated, perhaps in less precision: in the same order, or, where `pitch` is set, the
    copy's rows so many elements apart. If `turned`, it is of the copy's one block and lies transposed as seen from there."""

    file: str
    offset: int
    dtype: str
    pitch: int = 0
    turned: bool = False

    def after(self, numel: int) -> Twin:
        """Where the elements that come `numel` later are."""
        return replace(self, offset=self.offset + numel * ITEMSIZE[self.dtype])


@dataclass(frozen=True, slots=True)
class Copy:
    """`numel` consecutive elements from byte `offset` of `file`, or zeros if that is ''; they come next in their tensor.

    `blocks` are what they are of which logical tensors, in order; if `turned`, these are boxes of the transposed tensors, as
    the source holds them. Where `pitch` is set, the blocks have equally many rows and lie side by side in rows that begin so
    many elements apart. `replica` numbers the copies that ranks keep of one box; `counted` marks the one use of each source
    element that enters its digest. `twin` is to be compared on the way, and so are the `others`, copies that should be
    equal, of all of which the mean is taken if `mean`.
    """

    file: str
    offset: int
    numel: int
    dtype: str
    blocks: tuple[tuple[Tensor, Box], ...] = ()
    replica: int = 0
    counted: bool = False
    twin: Twin | None = None
    others: tuple[Twin, ...] = ()
    mean: bool = False
    pitch: int = 0
    turned: bool = False

    @property
    def rows(self) -> int:
        """The rows of its first block."""
        return self.blocks[0][1].rows

    @property
    def cols(self) -> int:
        """The columns of its rows, if these have a pitch, else those of its first block."""
        if self.pitch:
            return sum(box.cols for _, box in self.blocks)
        return self.blocks[0][1].cols if self.blocks else 1

    def reads(self) -> Iterator[Copy]:
        """Itself."""
        yield self

    def is_followed_by(self, other: object) -> bool:
        """Whether `other` goes on where this one ends, at the source, the twin and the others, and is treated alike."""
        if not isinstance(other, Copy):
            return False
        if (self.file, self.offset + self.numel * ITEMSIZE[self.dtype], self.dtype, self.replica, self.counted,
                bool(self.blocks), self.turned, self.pitch, other.pitch) != (
                other.file, other.offset, other.dtype, other.replica, other.counted, bool(other.blocks), other.turned, 0, 0):
            return False
        if any(one.pitch for one in (self.twin, *self.others) if one):
            return False
        return ((self.twin and self.twin.after(self.numel)) == other.twin
                and tuple(one.after(self.numel) for one in self.others) == other.others)

    def is_beside(self, other: Copy) -> bool:
        """Whether each row of `other` goes on where this one's ends, at the source, the twin and the others, and is treated
        alike; both have a pitch."""
        if (self.file, self.offset + self.cols * ITEMSIZE[self.dtype], self.dtype, self.replica, self.counted, self.turned,
                self.pitch, self.rows) != (other.file, other.offset, other.dtype, other.replica, other.counted, other.turned,
                                           other.pitch, other.rows):
            return False
        mine, theirs = ((one.twin, *one.others) if one.twin else one.others for one in (self, other))
        return (all(one.pitch and not one.turned for one in mine)
                and tuple(one.after(self.cols) for one in mine) == theirs)


@dataclass(frozen=True, slots=True)
class Weave:
    """Copies of equally many rows that lie side by side in each row of their tensor."""

    panels: tuple[Copy, ...]

    def reads(self) -> Iterator[Copy]:
        """Its panels."""
        return iter(self.panels)

    @property
    def numel(self) -> int:
        return sum(panel.numel for panel in self.panels)

    @property
    def rows(self) -> int:
        return self.panels[0].rows

    @property
    def cols(self) -> int:
        return sum(panel.cols for panel in self.panels)

    def is_followed_by(self, other: object) -> bool:
        """Nothing can be made one with it."""
        return False


@dataclass(frozen=True, slots=True)
class Transpose:
    """Panels of rows × cols each, transposed and interleaved: element [row, col] of panel k is element [col, row, k] of
    their tensor. Each copy of a panel has its `pitch` set; its columns, from the first on, fill boxes of the panel that have
    its rows."""

    panels: tuple[tuple[tuple[tuple[Box, ...], Copy], ...], ...]
    rows: int
    cols: int

    def reads(self) -> Iterator[Copy]:
        """The copies that its panels are made of."""
        return (copy for panel in self.panels for _, copy in panel)

    @property
    def numel(self) -> int:
        return len(self.panels) * self.rows * self.cols

    def is_followed_by(self, other: object) -> bool:
        """Whether its panels go on in those of `other`."""
        return (isinstance(other, Transpose) and self.rows == other.rows
                and next(self.reads()).dtype == next(other.reads()).dtype)


@dataclass(frozen=True, slots=True)
class FileTask:
    """Everything one worker needs to write one output file; `copies[i]` fill tensor i in order."""

    path: str
    segments: tuple[Segment, ...]
    specs: tuple[TensorSpec, ...]
    copies: tuple[tuple[Copy | Weave | Transpose, ...], ...]

    def reads(self) -> Iterator[Copy]:
        """What it reads of the source, each run or panel for itself."""
        return (read for copies in self.copies for copy in copies for read in copy.reads())

    def files(self) -> set[str]:
        """The source files that it reads, twins and other copies included."""
        return {one.file for copy in self.reads() for one in (copy, copy.twin, *copy.others) if one and one.file}

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments)

    @property
    def streamed(self) -> int:
        """The bytes that come from the source, after any cast."""
        return sum(segment.nbytes for segment in self.segments if isinstance(segment, Hole))

    @property
    def bytes_read(self) -> int:
        return sum(copy.numel * ITEMSIZE[copy.dtype] for copy in self.reads())


@dataclass(slots=True)
class Plan:
    tasks: list[FileTask]
    unused: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(task.nbytes for task in self.tasks)
