"""The plan: which bytes of the source make up which bytes of each output file. A value; planner.py
makes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from parammap.formats.frames import Frame, Hole, Segment
from parammap.tensors.layout import Place
from parammap.tensors.logical import (
    EXP_AVG,
    EXP_AVG_SQ,
    ITEMSIZE,
    MAIN_PARAM,
    LogicalTensor,
    Stored,
    TensorSpec,
)
from parammap.tensors.region import Region
from parammap.tensors.shard import Shard
from parammap.tensors.view import View, row_major


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor that an output file should hold: its spec and its parts, the regions of logical
    tensors that make it up, each with where it lies in the tensor.

    A part without a tensor is a gap, filled with zeros. The dtype of the parts' views may be
    another than the spec's. `source` stands instead of parts for a tensor that is copied as it is
    and is no part of the training state."""

    spec: TensorSpec
    parts: tuple[Shard, ...] = ()
    source: Stored | None = None


def placed(part: Shard, spec: TensorSpec) -> Shard:
    """A part with its view in the tensor as it is written."""
    return part if part.view.dtype == spec.dtype else replace(part, view=part.view.cast(spec.dtype))


def narrowed(wanted: Wanted, region: Region) -> Wanted:
    """A region of a tensor that is made of parts, as a tensor of its own."""
    spec = replace(wanted.spec, shape=region.sizes)
    parts, step = [placed(part, spec) for part in wanted.parts], ITEMSIZE[spec.dtype]
    sizes = zip(wanted.spec.shape, region.offsets, region.sizes, strict=True)
    for size, start, count in reversed(list(sizes)):
        low, high = start * step, (start + count) * step
        parts = [one for part in parts for one in part.strip(size * step, low, high)]
        step *= count
    return Wanted(spec, tuple(parts))


def in_a_row(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """The shards as parts of a tensor in which all are row-major and follow each other."""
    parts, position = [], 0
    for shard in shards:
        view = row_major(shard.region.sizes, shard.view.dtype, "", position)
        parts.append(replace(shard, view=view))
        position += view.span
    return tuple(parts)


def interleaved(panels: Sequence[tuple[Shard, ...]]) -> tuple[Shard, ...]:
    """The shards of panels as parts of a tensor of which element [row, col, k] is [col, row] of
    panel k: each panel's shards are whole rows of it, one after the other, and all panels have as
    many."""
    parts, count = [], len(panels)
    for number, panel in enumerate(panels):
        itemsize, rows, position = (
            panel[0].view.itemsize,
            sum(shard.region.sizes[0] for shard in panel),
            number,
        )
        for shard in panel:
            view = View(
                "",
                position * itemsize,
                shard.view.dtype,
                shard.region.sizes,
                (count * itemsize, rows * count * itemsize),
            )
            parts.append(replace(shard, view=view))
            position += count * shard.region.sizes[0]
    return tuple(parts)


def gap(rows: int, cols: int, dtype: str = "float32") -> Shard:
    """A part that is zeros."""
    return Shard(None, Region((0, 0), (rows, cols)), row_major((rows, cols), dtype))


@dataclass(frozen=True, slots=True)
class WantedFile:
    """An output file: where it goes, how its container frames it, what it holds, and the rank whose
    file it is (None: all ranks'). One that `completes` the output is written when all others are
    there."""

    path: str
    segments: tuple[Segment, ...]
    tensors: tuple[Wanted, ...]
    place: Place | None = None
    completes: bool = False


def file_of_objects(
    path: str,
    frame: Frame,
    wanted: Mapping[TensorSpec, Wanted],
    place: Place | None = None,
) -> WantedFile:
    """A file of Python objects, of whose tensors each is planned, or lies somewhere in the source's
    metadata and is copied as it is."""
    tensors = (
        wanted[leaf]
        if isinstance(leaf, TensorSpec)
        else Wanted(TensorSpec(f"{path}:{number}", leaf.dtype, leaf.shape), source=leaf)
        for number, leaf in enumerate(frame.tensors)
    )
    return WantedFile(path, tuple(frame.segments), tuple(tensors), place)


@dataclass(frozen=True, slots=True)
class Output:
    """What a framework's writer asks for: the files, each rank's source folder with its file or
    folder in the output, the links to make (link, existing file), and what is worth saying in the
    manifest. `states` are the states that it has room for, `needless` the names of tensors that no
    model computes with, and `extra_states` those that are kept, by name and place. `aliases` are names
    under which a state dict has a tensor of another name once more."""

    files: list[WantedFile]
    converted: list[tuple[Path, str]]
    links: list[tuple[str, str]]
    notes: dict[str, object]
    states: tuple[str, ...] = (MAIN_PARAM, EXP_AVG, EXP_AVG_SQ)
    ignorable: frozenset[str] = frozenset()
    extra_states: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fill:
    """Elements of an output tensor: `target`, whose bytes count from the tensor's begin, gets
    `source`, index by index, or zeros if there is none.

    They are `region` of the logical `tensor`, if they are part of one: the last axis of the views
    is along its columns, all others together along its rows. `replica` numbers the copies that
    ranks keep of the region; `counted` marks the one use of each source element that enters its
    digest. `model_copy` is to be compared on the way, and so are the `others`, replicas that should
    be equal, of all of which the mean is taken if `mean`. All views have the same shape."""

    target: View
    source: View | None
    tensor: LogicalTensor | None = None
    region: Region | None = None
    replica: int = 0
    counted: bool = False
    model_copy: View | None = None
    others: tuple[View, ...] = ()
    mean: bool = False

    @property
    def reads(self) -> tuple[View, ...]:
        """All that is read for it."""
        return tuple(view for view in (self.source, self.model_copy, *self.others) if view)

    @property
    def is_turned(self) -> bool:
        """Whether something that is read lies in another order than what is written."""
        return any(view.innermost not in (None, self.target.innermost) for view in self.reads)


def panels(fills: Sequence[Fill]) -> Iterator[tuple[int, int, list[Fill]]]:
    """Bytes [start, stop) of a tensor, with the fills (given in order of their targets) whose
    elements alternate there."""
    first = 0
    while first < len(fills):
        last, stop = first, fills[first].target.offset + 1
        while last < len(fills) and fills[last].target.offset < stop:
            target = fills[last].target
            last, stop = last + 1, max(stop, target.offset + target.span)
        yield fills[first].target.offset, stop, list(fills[first:last])
        first = last


@dataclass(frozen=True, slots=True)
class FileTask:
    """Everything one worker needs to write one output file; `fills[i]` are those of tensor i, in
    order of their targets."""

    path: str
    segments: tuple[Segment, ...]
    specs: tuple[TensorSpec, ...]
    fills: tuple[tuple[Fill, ...], ...]

    def files(self) -> set[str]:
        """The source files that it reads, those of copies that are compared included."""
        return {view.file for fills in self.fills for fill in fills for view in fill.reads}

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments)

    @property
    def streamed(self) -> int:
        """The bytes that come from the source, after any cast."""
        return sum(segment.nbytes for segment in self.segments if isinstance(segment, Hole))

    @property
    def bytes_read(self) -> int:
        return sum(
            fill.source.numel * fill.source.itemsize
            for fills in self.fills
            for fill in fills
            if fill.source
        )


@dataclass(slots=True)
class Plan:
    tasks: list[FileTask]
    unused: list[str] = field(default_factory=list)

    def sources(self) -> set[str]:
        """The files that its tasks read."""
        return set[str]().union(*(task.files() for task in self.tasks))

    @property
    def nbytes(self) -> int:
        return sum(task.nbytes for task in self.tasks)
