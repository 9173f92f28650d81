"""Comparing two checkpoints of any framework and layout, logical tensor by logical tensor and
element by element."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import permutations
from typing import TypeAlias

import numpy as np

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import Index, is_padding
from parammap.errors import RefusedError
from parammap.execute.checks import SHOWN_POSITIONS, cast, widen_bits
from parammap.execute.gather import Files
from parammap.families import HEAD, WORD_EMBEDDING
from parammap.frameworks import registry
from parammap.proof.stream import Copy, bands, copies_of, in_processes, tiles
from parammap.tensors.arrays import Array
from parammap.tensors.logical import ITEMSIZE, MAIN_PARAM, MODEL_PARAM, LogicalTensor
from parammap.tensors.region import Cells, Region, cells_of

#: a tensor that differs in so many elements at most has each of them listed, one that does in more
#: the first few
LISTED = 32
#: (state, name) of a logical tensor
Key = tuple[str, str]
#: gives the file and byte offset of the element at a row and column
Place = Callable[[int, int], tuple[str, int]]
#: (bits of a, bits of b, values of a, values of b, whether across a cast): which elements differ
Wrong: TypeAlias = Callable[[Array, Array, Array, Array, bool], Array]
_FLOATS = {"float64": np.float64, "float32": np.float32, "float16": np.float16}
_CASTS = set(permutations(("float32", "float16", "bfloat16"), 2))


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Elements a and b are equal if |a − b| ≤ atol + rtol · |b|, or if both are NaN; None stands
    for bit by bit."""

    rtol: float = 0.0
    atol: float = 0.0


@dataclass(frozen=True, slots=True)
class Position:
    """An element that differs: of the tensor seen as a matrix, with both values and where each lies
    on disk."""

    row: int
    column: int
    a: float
    b: float
    place_a: tuple[str, int]
    place_b: tuple[str, int]


@dataclass(slots=True)
class Difference:
    """What differs of tensor `a`, which is `b` on the other side. `largest` is max |a − b|, NaN
    aside.

    `apart` says in what else the two differ: the shape, so that no elements could be compared, or
    the dtype."""

    a: LogicalTensor
    b: LogicalTensor
    elements: int = 0
    largest: float = 0.0
    positions: list[Position] = field(default_factory=list)
    apart: str | None = None

    def add(
        self,
        wrong: Array,
        a: Array,
        b: Array,
        cells: Cells,
        places: tuple[Place, Place],
    ) -> None:
        """Take down the elements that are True in `wrong`; `a`, `b` are the values of the cells,
        and `places` say where one lies on disk. All arrays have the same shape."""
        at = np.flatnonzero(wrong)
        shape, a, b = wrong.shape, a.reshape(-1), b.reshape(-1)
        self.elements += len(at)
        self.largest = max(self.largest, _largest(a[at], b[at]))
        for element in map(int, at[: max(LISTED - len(self.positions), 0)]):
            row, col = cells.position(element, shape)
            self.positions.append(
                Position(
                    row,
                    col,
                    a[element].item(),
                    b[element].item(),
                    *(place(row, col) for place in places),
                )
            )

    def shorten(self) -> None:
        """Sort the positions, and keep but the first few unless all are listed."""
        self.positions.sort(key=lambda position: (position.row, position.column))
        if self.elements > LISTED:
            del self.positions[SHOWN_POSITIONS:]

    def stretches(self) -> list[list[Position]]:
        """The positions, those together that follow each other in a row (or the only column), in
        the same files."""
        down, right = (1, 0) if self.a.cols == 1 else (0, 1)
        found: list[list[Position]] = []
        for at in self.positions:
            last = found[-1][-1] if found else None
            if last and (
                last.row + down,
                last.column + right,
                last.place_a[0],
                last.place_b[0],
            ) == (at.row, at.column, at.place_a[0], at.place_b[0]):
                found[-1].append(at)
            else:
                found.append([at])
        return found

    @property
    def name(self) -> str:
        """Its name; both where the word embedding of one side is the head of the other."""
        names = " and ".join(dict.fromkeys((self.a.name, self.b.name)))
        return f"{names} ({self.a.state})"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tensors to compare; where `cast`, a's values are those of b in another dtype, and
    compared as such."""

    a: LogicalTensor
    b: LogicalTensor
    cast: bool = False

    @property
    def elements(self) -> int:
        return self.a.numel


@dataclass(slots=True)
class Pairing:
    """The tensors of both sides, and those of one side only; `aside` counts the model's own copies
    that only one keeps, `padding` are those that pad the two vocabularies with other numbers of
    rows."""

    pairs: list[Pair]
    only_a: list[LogicalTensor]
    only_b: list[LogicalTensor]
    aside: int = 0
    padding: list[LogicalTensor] = field(default_factory=list)


def pair(a: Checkpoint, b: Checkpoint) -> Pairing:
    """Pair tensors by state and name. Left aside are the model's own copies of weights where only
    one side keeps any, and padding of the vocabulary where one side has none or another number of
    rows, as layouts do."""
    mine, theirs = (
        {(tensor.state, tensor.name): tensor for tensor in one.index.shards} for one in (a, b)
    )
    found_a, only_a = _counterparts(mine, theirs, is_tied(b))
    found_b, only_b = _counterparts(theirs, mine, is_tied(a))
    pairs = dict.fromkeys(
        [*(Pair(own, its) for own, its in found_a), *(Pair(its, own) for own, its in found_b)]
    )
    pairing = Pairing([one for one in pairs if not _pads_otherwise(one)], only_a, only_b)
    pairing.padding = [one.a for one in pairs if _pads_otherwise(one)]
    for side, other in (("only_a", b), ("only_b", a)):
        alone = getattr(pairing, side)
        kept = [
            tensor
            for tensor in alone
            if tensor.state != MODEL_PARAM or other.index.tensors(MODEL_PARAM)
        ]
        pairing.aside += len(alone) - len(kept)
        pairing.padding += filter(is_padding, kept)
        setattr(pairing, side, [tensor for tensor in kept if not is_padding(tensor)])
    return pairing


def _counterparts(
    tensors: dict[Key, LogicalTensor], others: dict[Key, LogicalTensor], tied: bool
) -> tuple[list[tuple[LogicalTensor, LogicalTensor]], list[LogicalTensor]]:
    """Each tensor with the other side's, and those without one. Where the other side's head is its
    word embedding, which this side may not have recorded, it stands for this side's head too."""
    found, alone = [], []
    for key, tensor in tensors.items():
        other = others.get(key) or (others.get(as_embedding(key)) if tied else None)
        if other:
            found.append((tensor, other))
        else:
            alone.append(tensor)
    return found, alone


def as_embedding(key: Key) -> Key:
    """(state, name) of the word embedding's tensor that a head's tensor is, where the two are tied;
    else the key itself."""
    state, name = key
    return state, WORD_EMBEDDING + name.removeprefix(HEAD) if name.startswith(HEAD) else name


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether it is known that the output layer is the word embedding."""
    recorded = registry.framework(checkpoint.framework).tied(checkpoint)
    return bool(recorded) or any(held.is_tied_head for held in checkpoint.index.held)


def _pads_otherwise(one: Pair) -> bool:
    return is_padding(one.a) and one.a.shape != one.b.shape


def casts_of_weights(a: Index, b: Index) -> list[Pair]:
    """The model's own copies in `a`, each with the weight in `b` of which it must be the cast."""
    weights = {tensor.name: tensor for tensor in b.tensors(MAIN_PARAM)}
    return [
        Pair(tensor, weights[tensor.name], cast=True)
        for tensor in a.tensors(MODEL_PARAM)
        if tensor.name in weights
    ]


def differences(
    a: Index, b: Index, pairs: list[Pair], tolerance: Tolerance | None = None, workers: int = 1
) -> list[Difference]:
    """The pairs that differ, in order; every copy that ranks keep of a tensor is compared.

    Raises RefusedError if there is no element to compare.
    """
    if not sum(pair.elements for pair in pairs):
        raise RefusedError(
            "no tensor is in both checkpoints, so nothing was compared; are they of the same model?"
        )
    found = in_processes(lambda pair: _difference(a, b, pair, tolerance), pairs, workers)
    return [difference for difference in found if difference]


def _difference(a: Index, b: Index, pair: Pair, tolerance: Tolerance | None) -> Difference | None:
    found = Difference(pair.a, pair.b)
    if pair.a.shape != pair.b.shape:
        found.apart = f"shape {list(pair.a.shape)} and {list(pair.b.shape)}"
        return found
    same_bits = pair.a.dtype == pair.b.dtype or (
        pair.cast and (pair.b.dtype, pair.a.dtype) in _CASTS
    )
    if not same_bits and tolerance is None:
        found.apart = f"{pair.a.dtype} and {pair.b.dtype}"
    wrong: Wrong = (
        _wrong_bits if same_bits and tolerance is None else _Wrong(tolerance or Tolerance())
    )
    regions = a.shards[pair.a], b.shards[pair.b]
    with Files() as files:
        for number in range(max(map(copies_of, regions))):
            copies = Copy(pair.a, regions[0], number), Copy(pair.b, regions[1], number)
            _compare(pair, copies, wrong, files, found)
    found.shorten()
    return found if found.elements or found.apart else None


def _compare(
    pair: Pair, copies: tuple[Copy, Copy], wrong: Wrong, files: Files, found: Difference
) -> None:
    copy_a, copy_b = copies
    for band, bits_a, bits_b in read_both(pair, copy_a, copy_b, files):
        dtype_b = pair.a.dtype if pair.cast else pair.b.dtype
        if pair.a.dtype == dtype_b and np.array_equal(bits_a, bits_b):
            continue
        a, b = values(bits_a, pair.a.dtype), values(bits_b, dtype_b)
        at = wrong(bits_a, bits_b, a, b, pair.cast)
        if at.any():
            found.add(
                at.reshape(band.sizes),
                a,
                b,
                cells_of(band, band.sizes),
                (copy_a.place, copy_b.place),
            )


def read_both(
    pair: Pair, copy_a: Copy, copy_b: Copy, files: Files
) -> Iterator[tuple[Region, Array, Array]]:
    """The bits of both, band by band; b's in a's dtype where they are compared across a cast."""
    itemsize = max(ITEMSIZE[pair.a.dtype], ITEMSIZE[pair.b.dtype])
    cut = tiles if copy_a.is_transposed or copy_b.is_transposed else bands
    for band in cut(Region((0, 0), pair.a.matrix), itemsize):
        bits = copy_b.read(band, files)
        yield (
            band,
            copy_a.read(band, files),
            recast(bits, pair.b.dtype, pair.a.dtype) if pair.cast else bits,
        )


def recast(bits: Array, dtype: str, to: str) -> Array:
    """The bits of `dtype` values as the bits of the same values in `to`, rounded to nearest
    even."""
    return bits if dtype == to else cast(bits, dtype, to)


def _wrong_bits(bits_a: Array, bits_b: Array, a: Array, b: Array, cast: bool) -> Array:
    """Bit by bit; across a cast a NaN is a NaN, since frameworks do not agree which one it
    becomes."""
    differs: Array = bits_a != bits_b
    return differs & ~(np.isnan(a) & np.isnan(b)) if cast else differs


class _Wrong:
    """By value, within a tolerance."""

    def __init__(self, tolerance: Tolerance) -> None:
        self.tolerance = tolerance

    def __call__(self, bits_a: Array, bits_b: Array, a: Array, b: Array, cast: bool) -> Array:
        a, b = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(invalid="ignore"):
            close = np.abs(a - b) <= self.tolerance.atol + self.tolerance.rtol * np.abs(b)
        same: Array = close | (a == b) | (np.isnan(a) & np.isnan(b))
        return ~same


def values(bits: Array, dtype: str) -> Array:
    """The values of elements given as bits, in a numpy dtype that holds them exactly; shape as
    `bits`."""
    if dtype == "bfloat16":
        return widen_bits(bits, dtype).view(np.float32)
    return bits.view(_FLOATS.get(dtype) or np.dtype(dtype))


def _largest(a: Array, b: Array) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float(np.max(distance, initial=0.0, where=~np.isnan(distance)))


def told(found: Difference) -> str:
    """A difference in words: how many elements, by how much, and where the first ones lie."""
    if not found.elements:
        return f"{found.apart} in output and source"
    return (
        (f"{found.apart}; " if found.apart else "")
        + f"{found.elements} of {found.a.numel} elements differ, by at most "
        f"{found.largest:.9g}; first: " + "; ".join(map(_told_stretch, found.stretches()))
    )


def _told_stretch(positions: list[Position]) -> str:
    at, last, more = positions[0], positions[-1], len(positions) > 1
    return (
        f"[{_span(at.row, last.row)}, {_span(at.column, last.column)}] {at.a:.9g}{' …' * more} and "
        f"{at.b:.9g}{' …' * more} ({at.place_a[0]} byte {at.place_a[1]}, {at.place_b[0]} byte "
        f"{at.place_b[1]})"
    )


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}:{last + 1}"
