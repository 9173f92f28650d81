"""Fused tensors as arrangements of logical tensors: which rows of q, k, v, gate and up a rank's
tensor holds, and where.

An arrangement is a pattern of axes, outermost first. `[q: nd | k: d | v: d]` is an axis on which
parts follow each other, each a logical tensor of its own; what is before and after it, all parts
have. The last axis of the pattern is the columns of the logical tensors, those before it are their
rows; `e` counts experts, whose tensors are logical tensors of their own. Letters are sizes: g query
groups, n heads in a group, d the size of a head, v the true vocabulary, p its padding, e the
experts of a rank, a and b the rows of q's and kv's down-projections; any other is what the shape
leaves. Letters side by side are multiplied.

`tp` is the axis that tensor parallelism cuts. If it is the outermost one (`[]` for the parts'),
each rank holds an equal run of the whole tensor; an axis inside cuts each part for itself."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from parammap.errors import RefusedError
from parammap.tensors.logical import ITEMSIZE
from parammap.tensors.region import Region
from parammap.tensors.shard import Shard, merged
from parammap.tensors.view import View

#: how a family's tensor is cut over tensor-parallel ranks, and which logical tensors it is made of
(
    REPLICATED,
    SHARD_0,
    SHARD_1,
    VOCAB,
    QKV,
    STACKED_QKV,
    QK,
    GATE_UP,
    KVQ,
    EXPERTS_FC1,
    EXPERTS_FC2,
    QKV_DOWN,
) = (
    "replicated",
    "rows",
    "cols",
    "vocab",
    "qkv",
    "stacked_qkv",
    "qk",
    "gate_up",
    "kvq",
    "experts_fc1",
    "experts_fc2",
    "qkv_down",
)
#: multi-latent attention's down-projections of one rank, of which nobody knows whether several
#: would cut them (cuts.py)
Q_DOWN, KV_DOWN = "q_down", "kv_down"
#: arrangements of tensors that hold all experts of a rank
GROUPED = (EXPERTS_FC1, EXPERTS_FC2)
#: the part that the rows of a vocabulary's padding make up
PADDING = "padding"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What arrangements depend on beside a tensor's shape; None: nobody recorded it.

    `groups` is `heads` for multi-head attention; `vocab` counts the true vocabulary, without
    padding; `gated` says whether grouped experts have gate and up. `q_down` and `kv_down` are the
    rows of multi-latent attention's down-projections, and `whole_downs` says whether the run's
    release keeps them whole on every rank."""

    heads: int | None = None
    groups: int | None = None
    vocab: int | None = None
    experts: int | None = None
    gated: bool = False
    q_down: int | None = None
    kv_down: int | None = None
    whole_downs: bool | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a rank's tensor: its name ('' for a tensor that is not fused), the shape of the
    logical tensor that it is of, which region of that it is, and where it lies in the rank's
    tensor."""

    name: str
    shape: tuple[int, ...]
    region: Region
    view: View


#: an axis of a pattern: its letters, or the parts on it, each with its letters
Axis = str | tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How a tensor is put together: a pattern and the axis that ranks cut (see above).

    `dim` is the dimension of the tensor's shape in which parts and ranks follow each other. `uncut`
    are the letters of what no rank may have a part of, in words, and `unfit` says that a shape does
    not go with the sizes."""

    pattern: str
    tp: str = ""
    dim: int = 0
    uncut: tuple[tuple[str, str], ...] = ()
    unfit: str = "a tensor of shape {shape} cannot be {number} equal parts: {names}"

    @property
    def axes(self) -> tuple[Axis, ...]:
        return _parsed(self.pattern)

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """The names of the parts, each with its letters; one without a name if the tensor is not
        fused."""
        return next((axis for axis in self.axes if not isinstance(axis, str)), (("", ""),))

    @property
    def is_cut_as_a_whole(self) -> bool:
        return self.tp == (self.axes[0] if isinstance(self.axes[0], str) else "[]")

    def arranged(
        self, shape: tuple[int, ...], tp: int, rank: int, sizes: Sizes, experts: range, dtype: str
    ) -> list[Part]:
        """The parts of rank `rank`'s tensor of local `shape`."""
        if self.dim and len(shape) != 2:
            raise RefusedError(f"a tensor of shape {list(shape)} cannot be split along dim 1")
        length = self._lengths(shape, tp, sizes, experts)
        parts = list(self._parts(shape, length, experts, dtype))
        if self.is_cut_as_a_whole:
            return list(_run_of(parts, rank, math.prod(shape))) if tp > 1 else parts
        return [self._share(part, tp, rank) for part in parts] if self.tp else parts

    def count(self, letters: str, shape: tuple[int, ...], sizes: Sizes) -> int:
        """How many there are of what the letters say in a tensor that is `shape` as a whole."""
        if letters == "[]":
            return shape[self.dim]
        known = _known(sizes)
        if not set(letters) <= known.keys():
            return self._lengths(shape, 1, sizes, range(sizes.experts or 0))(letters)
        return math.prod(known[letter] for letter in letters)

    def _lengths(
        self, shape: tuple[int, ...], tp: int, sizes: Sizes, experts: range
    ) -> Callable[[Axis], int]:
        """The length of each axis (or letters) of a tensor of which a rank holds `shape`: of its
        share, or, if it is cut as a whole, of the whole."""
        ranks, shares = (tp, 1) if self.is_cut_as_a_whole else (1, tp)
        known: dict[Axis, int] = {
            letter: size // shares if letter in self.tp else size
            for letter, size in _known(sizes).items()
        }
        known["e"] = len(experts)
        beside = self.axes[-2 if self.dim else -1]
        known[beside] = shape[0] if self.dim else math.prod(shape[1:])
        along = [axis for axis in self.axes if axis != beside]
        letters = {
            letter
            for axis in along
            for letter in (axis if isinstance(axis, str) else "".join(dict(axis).values()))
        }
        if "n" in letters and "n" not in known:
            raise RefusedError("the number of attention heads is not recorded")
        unknown = letters - known.keys()

        def length(axis: Axis, size: int) -> int:
            if isinstance(axis, str):
                return math.prod(size if letter in unknown else known[letter] for letter in axis)
            return sum(length(letters, size) for _, letters in axis)

        total = (shape[self.dim] if shape else 1) * ranks
        fixed = math.prod(length(axis, 0) for axis in along)
        each = math.prod(length(axis, 1) for axis in along) - fixed
        size, rest = divmod(total - fixed, each) if each else (0, total - fixed)
        if (
            rest
            or size < 0
            or ("n" in letters and sizes.heads and sizes.groups and sizes.heads % sizes.groups)
            or unknown & {"a", "b"}
        ):
            names = [name for name, _ in self.parts]
            raise RefusedError(
                self.unfit.format(
                    shape=list(shape),
                    count=shape[self.dim],
                    tp=tp,
                    sizes=sizes,
                    parts=tuple(names),
                    number=len(names),
                    names=", ".join(names),
                    both=" and ".join(names),
                    experts=len(experts),
                )
            )
        return lambda axis: length(axis, size)

    def _parts(
        self, shape: tuple[int, ...], length: Callable[[Axis], int], experts: range, dtype: str
    ) -> Iterator[Part]:
        """The parts of a tensor that is not cut."""
        axes, itemsize = self.axes, ITEMSIZE[dtype]
        counts = list(map(length, axes))
        strides = [itemsize * math.prod(counts[number + 1 :]) for number in range(len(axes))]
        fused = next(
            (number for number, axis in enumerate(axes) if not isinstance(axis, str)), None
        )
        first = axes[0] == "e"
        for number, expert in enumerate(experts if first else [None]):
            offset = number * strides[0] if first else 0
            for name, letters in self.parts:
                if fused is not None:
                    counts[fused] = length(letters)
                view = merged(
                    View("", offset, dtype, tuple(counts[first:]), tuple(strides[first:]))
                )
                rows, cols = math.prod(counts[first:-1]), counts[-1]
                yield Part(
                    name if expert is None else f"{expert}.{name}",
                    (rows, cols) if self.dim else (rows, *shape[1:]) if shape or self.tp else shape,
                    Region((0, 0), (rows, cols)),
                    view,
                )
                if fused is not None:
                    offset += counts[fused] * strides[fused]

    def _share(self, part: Part, tp: int, rank: int) -> Part:
        """A rank's share of a logical tensor, of which each rank's tensor has as much."""
        rows, cols = part.region.sizes
        if self.dim:
            return replace(
                part, shape=(rows, cols * tp), region=Region((0, rank * cols), (rows, cols))
            )
        return replace(
            part, shape=(rows * tp, *part.shape[1:]), region=Region((rank * rows, 0), (rows, cols))
        )


def _run_of(parts: list[Part], rank: int, numel: int) -> Iterator[Part]:
    """What a rank holds of a tensor of which each rank has a run of so many elements."""
    for part in parts:
        begin = rank * numel * part.view.itemsize
        for one in Shard(None, part.region, part.view).within(
            begin, begin + numel * part.view.itemsize
        ):
            yield replace(part, region=one.region, view=one.view.at("", -begin))


@lru_cache
def _parsed(pattern: str) -> tuple[Axis, ...]:
    return tuple(
        tuple(re.findall(r"(\w*): (\w+)", axis)) if axis[0] == "[" else axis
        for axis in re.findall(r"\[.*?\]|\w+", pattern)
    )


def _known(sizes: Sizes) -> dict[str, int]:
    known = {
        "g": sizes.groups,
        "n": sizes.heads and sizes.groups and sizes.heads // sizes.groups,
        "v": sizes.vocab,
        "a": sizes.q_down,
        "b": sizes.kv_down,
    }
    return {letter: size for letter, size in known.items() if size is not None}


_HEADS = (("attention heads", "gn"), ("query groups", "g"))
_ATTENTION = "{count} × {tp} rows do not fit {sizes.heads} heads in {sizes.groups} groups: {parts}"


def _experts_fc1(pattern: str) -> Arrangement:
    """megatron-core, GroupedMLP.weight1, whatever its shape says."""
    return Arrangement(
        pattern,
        "f",
        dim=1,
        uncut=(("columns of each expert's gate and up", "f"),),
        unfit="{count} columns are not {experts} experts' {both}",
    )


ARRANGEMENTS = {
    REPLICATED: Arrangement("r h"),
    Q_DOWN: Arrangement("r h", uncut=(("rows", "r"),)),
    KV_DOWN: Arrangement("r h", uncut=(("rows", "r"),)),
    SHARD_0: Arrangement("r h", "r", uncut=(("rows", "r"),)),
    SHARD_1: Arrangement("r h", "h", dim=1, uncut=(("columns", "h"),)),
    # rows of the true vocabulary, then its padding (Megatron-LM, tokenizer's
    # _vocab_size_with_padding)
    VOCAB: Arrangement(
        "[: v | padding: p] h",
        "[]",
        uncut=(("rows of the padded vocabulary", "[]"),),
        unfit="{count} × {tp} rows cannot hold a vocabulary of {sizes.vocab}",
    ),
    # Megatron-LM, checkpoint version ≥ 2
    QKV: Arrangement("g [q: nd | k: d | v: d] h", "g", uncut=_HEADS, unfit=_ATTENTION),
    # Yuan-2.0, LocalizedFilter's attention
    QK: Arrangement("g [q: nd | k: d] h", "g", uncut=_HEADS, unfit=_ATTENTION),
    # transformers, GPT2Attention's c_attn, transposed; Merak, its col_linear
    STACKED_QKV: Arrangement("[q: r | k: r | v: r] h", "r", uncut=_HEADS),
    # metaseq, ModelParallelMultiheadAttention's qkv_proj
    KVQ: Arrangement("[k: r | v: r | q: r] h", "r", uncut=_HEADS),
    # Megatron-LM, ParallelMLP and core MLP with gated_linear_unit
    GATE_UP: Arrangement("[gate: r | up: r] h", "r", uncut=(("rows each of gate and up", "r"),)),
    # megatron-core, FusedMLASelfAttention's linear_qkv_down_proj, 0.17 and later
    QKV_DOWN: Arrangement(
        "[q_down: a | kv_down: b] h",
        "ab",
        uncut=(("rows of q's down-projection", "a"), ("rows of kv's down-projection", "b")),
        unfit="{count} × {tp} rows are not the {sizes.q_down} and {sizes.kv_down} that the "
        "arguments say",
    ),
    EXPERTS_FC1: _experts_fc1("e h [gate: f | up: f]"),
    # megatron-core, GroupedMLP.weight2
    EXPERTS_FC2: Arrangement(
        "e [fc2: f] h",
        "f",
        uncut=(("rows of each expert", "f"),),
        unfit="{count} rows are not those of {experts} experts",
    ),
}
_UNGATED_FC1 = _experts_fc1("e h [fc1: f]")
# transformers, Phi3Attention's qkv_proj, where several heads share a group of keys and values
_GROUPED_QKV = Arrangement("[q: gnd | k: gd | v: gd] h", "g", uncut=_HEADS, unfit=_ATTENTION)


def arrangement(kind: str, sizes: Sizes) -> Arrangement:
    if kind == STACKED_QKV and sizes.groups not in (None, sizes.heads):
        return _GROUPED_QKV
    return _UNGATED_FC1 if kind == EXPERTS_FC1 and not sizes.gated else ARRANGEMENTS[kind]


@lru_cache(maxsize=4096)
def arranged(
    kind: str,
    shape: tuple[int, ...],
    tp: int,
    rank: int,
    sizes: Sizes = Sizes(),
    experts: range = range(0),
    dtype: str = "float32",
) -> tuple[Part, ...]:
    """The parts of tensor-parallel rank `rank`'s tensor of local `shape`. `experts` are those that
    the rank holds.

    Raises RefusedError where the shape does not go with the sizes.
    """
    parts = arrangement(kind, sizes).arranged(shape, tp, rank, sizes, experts, dtype)
    return tuple([part for part in parts if part.region.numel] or parts[:1])


def local_shape(
    kind: str, shape: tuple[int, ...], tp: int, sizes: Sizes, ep: int = 1
) -> tuple[int, ...]:
    """Each rank's shape of a tensor that is `shape` as a whole. Raises RefusedError where tp does
    not divide it."""
    for what, letters in arrangement(kind, sizes).uncut if tp > 1 else ():
        if (count := arrangement(kind, sizes).count(letters, shape, sizes)) % tp:
            raise RefusedError(f"{count} {what} cannot be divided over tp {tp}")
    if kind in (Q_DOWN, KV_DOWN) and tp > 1:
        raise RefusedError(
            "nobody recorded whether the release keeps it whole on every tensor-parallel rank; "
            "keep tp 1, or convert with the sidecar"
        )
    dim, ranks = ARRANGEMENTS[kind].dim, _ranks(kind, tp, ep)
    return (*shape[:dim], shape[dim] // ranks, *shape[dim + 1 :]) if ranks > 1 else shape


def whole_shape(kind: str, shape: tuple[int, ...], tp: int, ep: int = 1) -> tuple[int, ...]:
    """The shape as a whole of a tensor of which each rank holds `shape`."""
    dim, ranks = ARRANGEMENTS[kind].dim, _ranks(kind, tp, ep)
    return (*shape[:dim], shape[dim] * ranks, *shape[dim + 1 :]) if ranks > 1 else shape


def _ranks(kind: str, tp: int, ep: int) -> int:
    """Over how many ranks a tensor is cut."""
    return 1 if kind == REPLICATED else tp * ep if kind in GROUPED else tp
