"""Parallel layouts: how many ranks of each kind there are, which rank is which, and which layer
lives where."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from parammap.errors import RefusedError

#: of a run, times its model chunks: more than any cluster has, and few enough to go through
MAX_RANKS = 1 << 22
#: the one rank order that Megatron-LM and MindSpeed-Core-MS both use by default: tp varies fastest
RANK_ORDER = "tp-cp-ep-dp-pp"


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the parallel groups. `dp` counts replicas of the dense model, so `ep` divides it.

    Raises RefusedError for sizes that no run has."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    dp: int = 1
    order: str = RANK_ORDER

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in SIZES}
        for name, size in sizes.items():
            if type(size) is not int or not 1 <= size <= MAX_RANKS:
                raise RefusedError(
                    f"{name} {size!r:.40}: is no size from 1 to {MAX_RANKS}; the file that records "
                    "it is damaged"
                )
        if math.prod((self.tp, self.pp, self.vpp, max(self.ep, self.cp * self.dp))) > MAX_RANKS:
            raise RefusedError(f"{self}: no run has so many ranks; what records them is damaged")

    def __str__(self) -> str:
        return " ".join(f"{name}{getattr(self, name)}" for name in SIZES)

    def global_rank(self, tp: int, pp: int, dp: int = 0, cp: int = 0) -> int:
        """The rank at these coordinates, in the order tp-cp-ep-dp-pp; `ep` is the fast part of
        `dp`."""
        return ((pp * self.dp + dp) * self.cp + cp) * self.tp + tp

    def first_rank(self, tp: int, pp: int, ep: int) -> int:
        """The lowest rank at these coordinates, in this layout's order."""
        if self.order == RANK_ORDER:
            return self.global_rank(tp, pp, ep)
        return (pp * self.ep + ep) * self.cp * self.tp + tp

    def places_of(self, rank: int) -> set[tuple[int, int, int]]:
        """The (tp, pp, ep) that a global rank can be of. Megatron-LM counts ep after cp up to core
        0.8, and, from 0.9 on, experts' ranks without a cp of their own (parallel_state.py,
        RankGenerator)."""
        dense, experts = self.tp * self.cp, self.tp
        if self.order == RANK_ORDER:
            stages = {rank // (dense * self.dp)}
        else:
            stages = {rank // dense % self.pp, rank // (dense * self.ep) % self.pp}
        return {
            (rank % self.tp, pp, rank // size % self.ep)
            for pp in stages
            for size in (dense, experts)
        }


#: the names of a layout's sizes
SIZES = tuple(field.name for field in fields(Layout) if field.name != "order")


@dataclass(frozen=True, slots=True)
class Numbering:
    """How MindSpore's folders and layers are numbered where that is not recorded: dp and cp of the
    run that saved them, the layers that do nothing and are not in the model, and the suffix of the
    files that count."""

    dp: int | None = None
    cp: int | None = None
    noop: frozenset[int] = frozenset()
    suffix: str | None = None


AS_RECORDED = Numbering()


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetLayout:
    """The layout wanted: sizes, layers per stage (or per chunk), and what the vocabulary's rows are
    to be divisible by."""

    layout: Layout
    stage_layers: tuple[int, ...] = ()
    divisible_by: int | None = None


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a tensor lives in a layout."""

    tp: int = 0
    pp: int = 0
    ep: int = 0
    vpp: int = 0

    def __str__(self) -> str:
        return f"tp{self.tp} pp{self.pp} vpp{self.vpp} ep{self.ep}"


def number_layers(counts: dict[tuple[int, int], int]) -> dict[tuple[int, int], range]:
    """Global layer numbers by (pp, vpp) from the number of layers that each stage's chunk holds.

    Chunks follow each other in the order in which a micro-batch passes them: all stages' chunk 0,
    then all stages' chunk 1 … (Megatron-LM, interleaved pipeline schedule), whether the stages are
    even or not."""
    numbers, start = {}, 0
    for pp, vpp in sorted(counts, key=lambda key: (key[1], key[0])):
        numbers[pp, vpp] = range(start, start + counts[pp, vpp])
        start += counts[pp, vpp]
    return numbers
