"""From an element of a logical tensor to the bytes on disk that hold it, and back from a byte to
what it is."""

from __future__ import annotations

import itertools
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import StoredTensor, is_transposed
from parammap.errors import RefusedError
from parammap.execute.gather import Files
from parammap.proof.compare import values
from parammap.proof.contents import entries_of, structure_at
from parammap.tensors.layout import Place
from parammap.tensors.logical import ITEMSIZE, MAIN_PARAM, MODEL_PARAM, LogicalTensor, Stored
from parammap.tensors.names import suggest
from parammap.tensors.region import Region
from parammap.tensors.shard import Shard, fitted, merged, transposed, views_of
from parammap.tensors.view import row_major

_QUERY = re.compile(r"(?P<name>[^\[\]]+?)(?:\[(?P<index>[^\[\]]*)\])?$")

#: a range of indices per dimension
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class StoredRun:
    """Consecutive elements on disk that follow each other in the logical tensor as well, row by row
    of `region`.

    `key` is the file's own name of the tensor they lie in, and `element` the number of the first
    one in it, row-major."""

    tensor: LogicalTensor
    region: Region
    place: Place
    file: str
    key: str
    element: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What lies at a byte: elements of logical tensors, else `what` says it. `key`, `element`: in
    the file's own terms."""

    file: str
    offset: int
    runs: list[StoredRun]
    key: str | None
    element: int | None
    what: str


def locate(
    checkpoint: Checkpoint, query: str, place: dict[str, int] | None = None
) -> Iterator[StoredRun]:
    """The runs of bytes that hold `NAME[index, …]`, of every rank that keeps a copy, in the order
    of the ranks.

    NAME is an atom's canonical name, or a tensor's own name in the files; a state and a dot may go
    before it (exp_avg., exp_avg_sq., weight., model_weight.), without it the weight and the model's
    own copy are meant. An index is a number, a slice a:b, or left out for all; it counts in the
    atom's shape, or in the shape that the stored tensor has on its rank. `place` keeps only ranks
    with these tp, pp, ep, vpp. Raises RefusedError for names and indices that do not exist."""
    match = _QUERY.match(query.strip())
    if not match:
        raise RefusedError(
            f"{query}: write NAME[index, …], with a number, a:b or : for each dimension"
        )
    name, index = match["name"], match["index"]
    found = _named(checkpoint, name)
    chosen = [
        (held, tensor)
        for held, tensor in found
        if all(getattr(held.found.place, axis) == number for axis, number in (place or {}).items())
    ]
    if not chosen:
        raise RefusedError(
            f"{checkpoint.folder}: no rank of that place holds {name}; these do: "
            f"{', '.join(sorted({str(held.found.place) for held, _ in found}))}"
        )
    selections = [
        (held, tensor, _ranges(query, index, tensor.shape if tensor else held.found.stored.shape))
        for held, tensor in chosen
    ]
    return itertools.chain.from_iterable(
        _runs_of_atom(held, tensor, ranges) if tensor else _runs_of_stored(held, ranges)
        for held, tensor, ranges in selections
    )


def _named(checkpoint: Checkpoint, name: str) -> list[tuple[StoredTensor, LogicalTensor | None]]:
    """The tensors on disk that hold atom `name`, each with that atom; else those that are called
    so, with None."""
    for states, rest in _readings(checkpoint, name):
        held_of_states = [held for held in checkpoint.index.held if held.found.state in states]
        atoms: list[tuple[StoredTensor, LogicalTensor | None]] = [
            (held, tensor)
            for held in held_of_states
            for tensor in dict.fromkeys(part.tensor for part in held.parts)
            if tensor and tensor.name == rest
        ]
        stored: list[tuple[StoredTensor, LogicalTensor | None]] = [
            (held, None) for held in held_of_states if rest in (held.found.name, held.canonical)
        ]
        if atoms or stored:
            return atoms or stored
    known = {tensor.name for tensor in checkpoint.index.shards} | {
        held.found.name for held in checkpoint.index.held
    }
    raise RefusedError(f"{checkpoint.folder}: holds no {name}{suggest(name, known)}")


def _readings(checkpoint: Checkpoint, name: str) -> Iterator[tuple[set[str], str]]:
    yield {MAIN_PARAM, MODEL_PARAM}, name.removeprefix("module.")
    state, _, rest = name.partition(".")
    if state in checkpoint.index.states() | {MODEL_PARAM}:
        yield {state}, rest.removeprefix("module.")


def _ranges(query: str, index: str | None, shape: tuple[int, ...]) -> Ranges:
    parts = [part.strip() for part in index.split(",")] if index and index.strip() else []
    if len(parts) > len(shape):
        raise RefusedError(
            f"{query}: has {len(parts)} indices, the tensor's shape is {list(shape)}"
        )
    ranges = [_range(query, part, size) for part, size in zip(parts, shape, strict=False)]
    return (*ranges, *((0, size) for size in shape[len(parts) :]))


def _range(query: str, part: str, size: int) -> tuple[int, int]:
    low, colon, high = part.partition(":")
    try:
        start = int(low) if low else 0
        stop = (int(high) if high else size) if colon else int(part) + 1
    except ValueError:
        raise RefusedError(f"{query}: {part!r} is no index; write a number, a:b or :") from None
    if not 0 <= start < stop <= size:
        raise RefusedError(f"{query}: {part} is out of range for a dimension of {size} elements")
    return start, stop


# ----------------------------------------------------------------------------------------------------
# elements to bytes


def _flat_runs(ranges: Ranges, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The runs [start, stop) of row-major elements that `ranges` choose of a tensor; as long as
    they can be."""
    whole = len(shape)
    while whole and ranges[whole - 1] == (0, shape[whole - 1]):
        whole -= 1
    inner = math.prod(shape[whole:])
    if not whole:
        yield 0, inner
        return
    strides = [math.prod(shape[dim + 1 :]) for dim in range(whole)]
    low, high = ranges[whole - 1]
    for outer in itertools.product(*(range(*bounds) for bounds in ranges[: whole - 1])):
        start = (
            sum(number * stride for number, stride in zip(outer, strides[:-1], strict=True))
            + low * inner
        )
        yield start, start + (high - low) * inner


def _runs_of_atom(held: StoredTensor, tensor: LogicalTensor, ranges: Ranges) -> Iterator[StoredRun]:
    row, stop = ranges[0] if ranges else (0, 1)
    shards = list(held.shards(0, tensor))
    for low, high in _flat_runs(ranges[1:], tensor.shape[1:]):
        yield from _runs_in(held, shards, Region((row, low), (stop - row, high - low)))


def _runs_of_stored(held: StoredTensor, ranges: Ranges) -> Iterator[StoredRun]:
    shape, shards = held.found.stored.shape, list(held.shards(0))
    parts = transposed(held.parts, shape[::-1]) if is_transposed(held.row, shape) else held.parts
    for start, stop in _flat_runs(ranges, shape):
        runs = [
            run.cut(box)
            for part in parts
            for run in part.within(start * part.view.itemsize, stop * part.view.itemsize)
            for box in run.view.runs()
        ]
        for run in sorted(runs, key=lambda run: run.view.offset):
            yield from _runs_in(
                held, [shard for shard in shards if shard.tensor == run.tensor], run.region
            )


def _runs_in(held: StoredTensor, shards: list[Shard], region: Region) -> Iterator[StoredRun]:
    """The runs on disk that hold a region of the shards' tensor."""
    for shard in shards:
        if part := shard.region.intersect(region):
            for there, (view,) in fitted(part, [shard]):
                one = Shard(shard.tensor, there, merged(view))
                yield from (_run(held, one.cut(box)) for box in one.view.runs())


def _run(held: StoredTensor, shard: Shard) -> StoredRun:
    view = shard.view
    if shard.tensor is None:
        raise ValueError("a gap holds no element of a tensor")
    key, element, _ = _entry_at(view.file, view.offset) or ("", 0, None)
    return StoredRun(
        shard.tensor,
        shard.region,
        held.found.place,
        view.file,
        key,
        element,
        view.offset,
        view.numel * view.itemsize,
    )


@lru_cache(maxsize=64)
def _extents(file: str, changed: int) -> list[tuple[int, int, int, str, Stored]]:
    """The extents of a file's tensors in the order of their bytes: first byte, end, first byte in
    the tensor, the tensor."""
    found = []
    for key, stored in entries_of(Path(file)):
        starts = itertools.accumulate((extent.nbytes for extent in stored.extents), initial=0)
        found += [
            (extent.offset, extent.offset + extent.nbytes, start, key, stored)
            for extent, start in zip(stored.extents, starts, strict=False)
        ]
    return sorted(found, key=lambda extent: extent[0])


def _entry_at(file: str, offset: int) -> tuple[str, int, Stored] | None:
    """The key of the tensor in which a byte lies, the number of the element, and the tensor."""
    extents = _extents(file, os.stat(file).st_mtime_ns)
    for low, high, start, key, stored in reversed(
        extents[: bisect_right(extents, offset, key=lambda extent: extent[0])]
    ):
        if (
            offset < high
            and (element := _element_at(stored, offset, start + offset - low)) is not None
        ):
            return key, element, stored
    return None


def _element_at(stored: Stored, offset: int, position: int) -> int | None:
    """The number of a tensor's element that lies at a byte of the file, which would be byte
    `position` of a tensor without gaps; None if there is none."""
    if not stored.strides:
        return position // ITEMSIZE[stored.dtype]
    ((view, place),) = views_of(stored)
    index = view.index_at(offset)
    return None if index is None else int(np.ravel_multi_index(index, place.shape))


def value_at(file: str, offset: int, dtype: str) -> float | int:
    """The value of one element on disk."""
    with Files() as files:
        found = values(files.bits(row_major((1,), dtype, file, offset)), dtype)
    value: float | int = found[0].item()
    return value


# ----------------------------------------------------------------------------------------------------
# bytes to elements


def identify(checkpoint: Checkpoint, file: Path, offset: int) -> Answer:
    """What lies at a byte of a file, which is named as it is, or from the checkpoint's folder on.

    Raises RefusedError if there is no such byte.
    """
    path = next((path for path in (file, checkpoint.folder / file) if path.is_file()), None)
    if path is None:
        raise RefusedError(f"{file}: no such file, neither here nor in {checkpoint.folder}")
    if not 0 <= offset < path.stat().st_size:
        raise RefusedError(f"{path}: has {path.stat().st_size} bytes and no byte {offset}")
    known = sorted(
        {extent.file for held in checkpoint.index.held for extent in held.found.stored.extents}
    )
    name = next((name for name in known if os.path.samefile(name, path)), str(path))
    shards = [
        (held, shard)
        for held in checkpoint.index.held
        for shard in held.shards(0)
        if shard.view.file == name
    ]
    found = [run for held, shard in shards if (run := _run_at(held, shard, offset))]
    entry = _entry_at(name, offset)
    if entry is None:
        return Answer(name, offset, found, None, None, structure_at(path, offset))
    key, element, stored = entry
    return Answer(
        name,
        offset,
        found,
        key,
        element,
        "" if found else _other(offset, stored, [shard for _, shard in shards]),
    )


def _run_at(held: StoredTensor, shard: Shard, offset: int) -> StoredRun | None:
    """The element of a shard that lies at a byte; None if there is none."""
    index = shard.view.index_at(offset)
    return _run(held, shard.cut(Region(index, (1,) * len(index)))) if index else None


def _other(offset: int, stored: Stored, shards: list[Shard]) -> str:
    """A byte of a tensor that no parameter fills: a scalar, another tensor, or padding among
    parameters."""
    inside = sorted(
        (shard.view.offset, shard.tensor.name)
        for shard in shards
        if shard.tensor
        and any(e.offset <= shard.view.offset < e.offset + e.nbytes for e in stored.extents)
    )
    if not inside:
        return "scalar" if stored.numel == 1 else "a tensor that is no part of the training state"
    before = [neighbour for start, neighbour in inside if start <= offset]
    after = [neighbour for start, neighbour in inside if start > offset]
    return (
        "padding"
        + (f" after {before[-1]}" if before else "")
        + (f" before {after[0]}" if after else "")
    )
