"""The check a copy makes on its way: does the model's own weight equal the cast of the weight that
the optimizer steps?

Megatron-LM can save the two out of step. *Stale*: only the model's copy is old. *Permuted*: the
optimizer's slices were swapped, so the moments belong to other parameters as well: then its values
turn up under another parameter's name. *Unrelated*: neither; an old copy of a matrix goes with the
new one, values of another run do not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Self, TypeAlias, TypeVar

import numpy as np

from parammap.tensors.arrays import Array
from parammap.tensors.logical import LogicalTensor
from parammap.tensors.region import Cells
from parammap.tensors.shard import Shard
from parammap.tensors.view import View

STALE, PERMUTED, UNRELATED = "stale", "permuted", "unrelated"
SHOWN_POSITIONS = 4
WINDOW = 32
#: below this correlation, over at least so many elements, two matrices are not two steps of one
#: training
_LEAST_CORRELATION, _LEAST_ELEMENTS = 0.3, 64
_SEARCH_BYTES = 1 << 20


#: row, column, and what is told of an element: values, its file
Shown: TypeAlias = tuple[float | str, ...]


@dataclass(slots=True)
class Elements:
    """Some elements of a tensor: how many, and the `positions` of the first ones, each (row,
    column, what is told of it)."""

    tensor: LogicalTensor
    count: int = 0
    positions: list[Shown] = field(default_factory=list)

    def merge(self, other: Self) -> None:
        self.count += other.count
        self.positions = (self.positions + other.positions)[:SHOWN_POSITIONS]


@dataclass(slots=True)
class Misfit(Elements):
    """Elements whose model weight is not the cast of the optimizer's weight.

    `positions` are (row, column, cast weight, model weight); `window` is the float32 weights from
    the first one on."""

    window: bytes = b""
    sums: tuple[float, ...] = (0.0,) * 5
    permuted_with: str | None = None

    @property
    def kind(self) -> str:
        if self.permuted_with:
            return PERMUTED
        is_telling = self.tensor.rows > 1 and self.tensor.cols > 1 and self.count >= _LEAST_ELEMENTS
        return UNRELATED if is_telling and self._correlation() < _LEAST_CORRELATION else STALE

    def _correlation(self) -> float:
        """Of the cast and the model weights that differ; `sums` are Σa, Σb, Σab, Σaa, Σbb."""
        a, b, ab, aa, bb = (total / self.count for total in self.sums)
        spread = max((aa - a * a) * (bb - b * b), 0.0) ** 0.5
        return (ab - a * b) / spread if spread else 0.0

    def merge(self, other: Self) -> None:
        Elements.merge(self, other)
        self.sums = tuple(x + y for x, y in zip(self.sums, other.sums, strict=True))
        self.window = self.window or other.window


@dataclass(slots=True)
class Unequal(Elements):
    """Elements of which a rank keeps another copy than the first; `positions` are (row, column,
    first copy's value, other's value, other's file)."""


@dataclass(slots=True)
class NonFinite(Elements):
    """Elements that are infinite or not a number; `positions` are (row, column, file)."""


@dataclass(slots=True)
class Overflown(Elements):
    """Elements that are finite and too large for the float16 that they were written as; `positions`
    are (row, column, value, file). One that was written several times counts as often."""


Found = TypeVar("Found", bound=Elements)
#: the bits of the exponent, which are all set in what is not finite
_EXPONENT = {
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F800000,
    "float64": 0x7FF0000000000000,
}
#: the bits of the least number that float16 rounds to infinity: 65520, half way from its largest to
#: the next (IEEE 754)
_OVERFLOW = {"bfloat16": 0x4780, "float32": 0x477FF000}


def non_finite(tensor: LogicalTensor, cells: Cells, bits: Array, file: str) -> NonFinite | None:
    """What of these elements is not finite; None if all is."""
    mask = _EXPONENT.get(tensor.dtype)
    return (
        _marked(NonFinite, tensor, cells, (bits & bits.dtype.type(mask)) == mask, lambda i: (file,))
        if mask
        else None
    )


def overflown(tensor: LogicalTensor, cells: Cells, bits: Array, file: str) -> Overflown | None:
    """What of these elements, of a float32 or bfloat16 tensor, is finite but not so in float16;
    None if nothing is."""
    sizes = bits & bits.dtype.type((1 << 8 * bits.itemsize - 1) - 1)
    wrong = (sizes >= _OVERFLOW[tensor.dtype]) & (sizes < _EXPONENT[tensor.dtype])
    return _marked(
        Overflown, tensor, cells, wrong, lambda i: (_value_at(bits, i, tensor.dtype), file)
    )


def unequal(
    tensor: LogicalTensor, cells: Cells, first: Array, other: Array, file: str
) -> Unequal | None:
    """Compare the bits of two copies of some elements; None if they are equal."""
    return _marked(
        Unequal,
        tensor,
        cells,
        first != other,
        lambda i: (_value_at(first, i, tensor.dtype), _value_at(other, i, tensor.dtype), file),
    )


def _marked(
    kind: type[Found],
    tensor: LogicalTensor,
    cells: Cells,
    wrong: Array,
    tell: Callable[[int], Shown],
) -> Found | None:
    """The elements that are True in `wrong`, with what `tell` says of the first ones; None if none
    is."""
    if not wrong.any():
        return None
    found = np.flatnonzero(wrong)
    return kind(
        tensor,
        len(found),
        [(*cells.position(i, wrong.shape), *tell(i)) for i in map(int, found[:SHOWN_POSITIONS])],
    )


def _value_at(bits: Array, element: int, dtype: str) -> float:
    """The value of an element of an array of bits, counted row-major."""
    return value_of(bits[np.unravel_index(element, bits.shape)].reshape(1), dtype)


def mean_bits(copies: list[Array], dtype: str) -> Array:
    """The bits of the copies' mean, taken in float64 and rounded through float32; where all are
    equal, those very bits."""
    first = copies[0]
    same = np.logical_and.reduce([first == other for other in copies[1:]])
    mean = np.mean([_values(bits, dtype) for bits in copies], axis=0).astype(np.float32)
    return np.where(same, first, cast_bits(mean.view(np.uint32), dtype))


def compare(
    tensor: LogicalTensor, main: Array, cells: Cells, model: Array, model_dtype: str
) -> Misfit | None:
    """Compare the bits of a float32 main weight with the model's bits in `model_dtype`; None if all
    fit."""
    cast = cast_bits(main, model_dtype)
    if np.array_equal(cast, model):
        return None
    shape, (main, cast, model) = main.shape, (bits.reshape(-1) for bits in (main, cast, model))
    wrong = np.flatnonzero(
        (cast != model) & ~(_is_nan(cast, model_dtype) & _is_nan(model, model_dtype))
    )
    if not len(wrong):
        return None
    positions: list[Shown] = [
        (
            *cells.position(i, shape),
            value_of(cast[i : i + 1], model_dtype),
            value_of(model[i : i + 1], model_dtype),
        )
        for i in map(int, wrong[:SHOWN_POSITIONS])
    ]
    first = int(wrong[0])
    return Misfit(
        tensor,
        len(wrong),
        positions,
        main[first : first + WINDOW].tobytes(),
        _sums(_values(cast[wrong], model_dtype), _values(model[wrong], model_dtype)),
    )


def _sums(a: Array, b: Array) -> tuple[float, ...]:
    """Σa, Σb, Σab, Σaa, Σbb."""
    return tuple(float(total) for total in (a.sum(), b.sum(), a @ b, a @ a, b @ b))


def cast_bits(main: Array, dtype: str) -> Array:
    """The bits of float32 values (given as uint32) rounded to nearest even into `dtype`, as
    unsigned integers."""
    return _CASTS[dtype](main)


def cast(bits: Array, source: str, target: str) -> Array:
    """The bits of floating-point values of dtype `source` as bits of dtype `target`, rounded to
    nearest even."""
    return cast_bits(widen_bits(bits, source), target)


def _to_bfloat16(main: Array) -> Array:
    rounded = main + (np.uint32(0x7FFF) + ((main >> np.uint32(16)) & np.uint32(1)))
    nan = (main & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        rounded[nan] = main[nan] | np.uint32(0x00400000)
    made: Array = (rounded >> np.uint32(16)).astype(np.uint16)
    return made


def _to_float16(main: Array) -> Array:
    with np.errstate(over="ignore"):
        return main.view(np.float32).astype(np.float16).view(np.uint16)


_CASTS: dict[str, Callable[[Array], Array]] = {
    "bfloat16": _to_bfloat16,
    "float16": _to_float16,
    "float32": lambda main: main,
}


def widen_bits(bits: Array, dtype: str) -> Array:
    """The bits of `dtype` values as the bits of the same values in float32; shape [n], uint32."""
    if dtype == "bfloat16":
        return bits.astype(np.uint32) << np.uint32(16)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32).view(np.uint32)
    return bits


def _values(bits: Array, dtype: str) -> Array:
    made: Array = widen_bits(bits, dtype).view(np.float32).astype(np.float64)
    return made


def _is_nan(bits: Array, dtype: str) -> Array:
    return np.isnan(_values(bits, dtype))


def value_of(bits: Array, dtype: str) -> float:
    return float(_values(bits, dtype)[0])


def tell_permuted(misfits: list[Misfit], models: dict[str, list[Shard]]) -> None:
    """Mark the misfits whose optimizer values stand, in a row, in some other parameter's model
    weight.

    `models` gives the shards of the model's weights by atom name. WINDOW values that vary cannot
    recur by chance."""
    for name, view in ((name, shard.view) for name, shards in models.items() for shard in shards):
        windows = [
            (m, w)
            for m in misfits
            if m.tensor.name != name and (w := _telling(m.window, view.dtype))
        ]
        for chunk in _chunks(view) if windows else ():
            for misfit, window in windows:
                if not misfit.permuted_with and window in chunk:
                    misfit.permuted_with = name


def _telling(window: bytes, dtype: str) -> bytes:
    """The window's values in `dtype`; b'' if it is short or the values hardly vary."""
    values = cast_bits(np.frombuffer(window, np.uint32), dtype)
    varied = len(values) == WINDOW and np.count_nonzero(values[1:] != values[:-1]) >= WINDOW // 3
    return values.tobytes() if varied else b""


def _chunks(view: View) -> Iterator[bytearray]:
    """A view's bytes in chunks that overlap by a window, so that no window is cut."""
    chunk, overlap = bytearray(), WINDOW * view.itemsize
    with open(view.file, "rb") as file:
        for offset, nbytes in _reads(view):
            chunk += os.pread(file.fileno(), nbytes, offset)
            if len(chunk) >= _SEARCH_BYTES:
                yield chunk
                del chunk[:-overlap]
    yield chunk


def _reads(view: View) -> Iterator[tuple[int, int]]:
    """The byte runs (offset, bytes) that a view is in its file, in order, none longer than
    _SEARCH_BYTES."""
    for run in map(view.narrow, view.runs()):
        for low in range(0, run.span, _SEARCH_BYTES):
            yield run.offset + low, min(_SEARCH_BYTES, run.span - low)
