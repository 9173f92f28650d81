"""Planning: from the regions that output files want and those that a source holds to views of
bytes. Interval arithmetic.

It proves, before anything is copied, that each output element is written exactly once and that each
source element is used or named as left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from parammap.checkpoint.index import Index, is_padding
from parammap.errors import RefusedError
from parammap.plan.plan import FileTask, Fill, Plan, Wanted, WantedFile, panels, placed
from parammap.tensors.arrangement import PADDING
from parammap.tensors.layout import Place
from parammap.tensors.logical import LogicalTensor, TensorSpec
from parammap.tensors.region import Region, covers
from parammap.tensors.shard import Shard, fitted, views_of

#: what can be made of the copies that several ranks keep
OWN, REFUSE, FIRST, MEAN = "own", "refuse", "first", "mean"


@dataclass(slots=True)
class Planner:
    """Plans the wanted files over one source index. `model_copies` maps a state to that which
    repeats it in less precision.

    `replicas` says what becomes of a region that several ranks keep: OWN, each takes its own copy;
    else all take the first rank's, with which the others are compared, or, for MEAN, the mean of
    them all."""

    index: Index
    model_copies: dict[str, str] = field(default_factory=dict)
    replicas: str = OWN
    _used: dict[LogicalTensor, set[Region]] = field(default_factory=dict)
    _counted: set[tuple[LogicalTensor, Region, int]] = field(default_factory=set)
    _tensors: dict[tuple[str, str], LogicalTensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tensors = {(tensor.state, tensor.name): tensor for tensor in self.index.shards}

    def plan(self, files: list[WantedFile]) -> Plan:
        tasks = [
            FileTask(
                file.path,
                file.segments,
                tuple(w.spec for w in file.tensors),
                tuple(tuple(self.fills(w, file.place or Place())) for w in file.tensors),
            )
            for file in files
        ]
        return Plan(tasks, self._unused())

    def fills(self, wanted: Wanted, place: Place) -> list[Fill]:
        """What fills a tensor that the rank at `place` holds, in order of the targets. Raises
        RefusedError where the source does not hold just its elements."""
        spec = wanted.spec
        if wanted.source is not None:
            return [Fill(place, view) for view, place in views_of(wanted.source) if view.numel]
        if spec.data is not None:
            return []
        fills = [
            fill
            for part in wanted.parts
            if part.region.numel
            for fill in self._of(placed(part, spec), place)
        ]
        if (numel := sum(fill.target.numel for fill in fills)) != math.prod(spec.shape):
            raise RefusedError(f"{spec.name}: {numel} source elements for shape {list(spec.shape)}")
        fills.sort(key=lambda fill: fill.target.offset)
        _check_once(spec, fills)
        return fills

    def _of(self, part: Shard, place: Place) -> Iterator[Fill]:
        """What fills a part of an output tensor."""
        tensor = part.tensor
        if tensor is None:
            yield Fill(part.view, None)
        elif is_padding(tensor):
            yield from self._padding(part, tensor, place)
        else:
            yield from self._filled(part, self._known(tensor.state, tensor.name), place)

    def _filled(self, part: Shard, tensor: LogicalTensor, place: Place) -> Iterator[Fill]:
        """A part filled with the shards of the source, cut where those of its model copy end."""
        if part.tensor != tensor:
            raise RefusedError(f"{part.tensor} is {tensor!r} in the source")
        held = list(self.index.shards.overlapping(tensor, part.region))
        copy = self._tensors.get((self.model_copies.get(tensor.state, ""), tensor.name))
        holding = [
            (low, shards, copies)
            for region, shards in held
            for low, copies in (
                self.index.shards.overlapping(copy, region) if copy else [(region, [])]
            )
        ]
        if sum(region.numel for region, _, _ in holding) != part.region.numel:
            raise RefusedError(
                f"{tensor.name} ({tensor.state}): the source does not hold {part.region}"
            )
        self._used.setdefault(tensor, set()).add(part.region)
        for region, shards, copies in holding:
            taken = self._preferred(shards, place)
            copies = [self._preferred(copies, place)] if copies else []
            counted, others = self._reckoned(tensor, region, shards, taken)
            for there, (target, source, *compared) in fitted(
                region, [part, taken, *copies, *others]
            ):
                yield Fill(
                    target,
                    source,
                    tensor,
                    there,
                    shards.index(taken),
                    counted,
                    compared[0] if copies else None,
                    tuple(compared[len(copies) :]),
                    self.replicas == MEAN,
                )

    def _padding(self, part: Shard, tensor: LogicalTensor, place: Place) -> Iterator[Fill]:
        """Rows of a vocabulary's padding: the source's as far as they go, then copies of its last
        row (as Megatron-LM's tools/checkpoint pads, core_r0.6.0 … 0.16), which enter no digest."""
        state, name = tensor.state, tensor.name
        padding, ((row, col), (rows, cols)) = (
            self._tensors.get((state, name)),
            (part.region.offsets, part.region.sizes),
        )
        kept = max(min(rows, (padding.rows if padding else 0) - row), 0)
        if padding and kept:
            for there, (target,) in fitted(Region((row, col), (kept, cols)), [part]):
                yield from self._filled(Shard(padding, there, target), padding, place)
        if kept == rows:
            return
        last = padding or self._known(state, name.removesuffix(f".{PADDING}"))
        for region, shards in self.index.shards.overlapping(
            last, Region((last.rows - 1, col), (1, cols))
        ):
            taken = self._preferred(shards, place)
            ((_, (source,)),) = fitted(region, [taken])
            self._used.setdefault(last, set()).add(region)
            again = Region((row + kept, region.offsets[1]), (rows - kept, region.sizes[1]))
            for _, (target,) in fitted(again, [part]):
                repeated = source._replace(
                    shape=target.shape, strides=(*(0 for _ in target.shape[1:]), source.strides[-1])
                )
                yield Fill(target, repeated, last, region)

    def _known(self, state: str, name: str) -> LogicalTensor:
        if (state, name) not in self._tensors:
            raise RefusedError(f"{name} ({state}) is not in the source")
        return self._tensors[state, name]

    # -------------------------------------------------------------------------------------------------
    # replicas and proof

    def _preferred(self, shards: Sequence[Shard], place: Place) -> Shard:
        """Of replicas in order, that one which is to be taken: the first where all take one; else
        the rank's own if there is one, else one of its tensor-parallel rank, else the first."""
        if self.replicas != OWN or len(shards) == 1:
            return shards[0]
        tp, own = self.index.layout.tp, place.ep * self.index.layout.tp + place.tp
        return min(shards, key=lambda shard: (shard.replica != own, shard.replica % tp != place.tp))

    def _reckoned(
        self, tensor: LogicalTensor, region: Region, shards: list[Shard], taken: Shard
    ) -> tuple[bool, list[Shard]]:
        """Whether this is the first use of a replica, which enters its digest; and with which
        others it is compared: then, or wherever their mean is taken."""
        key = tensor, region, shards.index(taken)
        counted = key not in self._counted
        self._counted.add(key)
        compared = self.replicas == MEAN or (counted and self.replicas != OWN)
        return counted, [shard for shard in shards if shard is not taken] if compared else []

    def _unused(self) -> list[str]:
        """Names of the source tensors of which some region goes nowhere (replicas kept elsewhere do
        not count)."""
        repeated = set(self.model_copies.values())
        return sorted(
            f"{tensor.name} ({tensor.state})"
            for tensor in self.index.shards
            if tensor.state not in repeated
            and not covers(list(self._used.get(tensor, ())), tensor.matrix)
        )


def _check_once(spec: TensorSpec, fills: list[Fill]) -> None:
    """Refuse fills that leave bytes of the tensor out, or come upon some twice."""
    position = 0
    for start, stop, there in panels(fills):
        if (
            start != position
            or sum(fill.target.numel * fill.target.itemsize for fill in there) != stop - start
        ):
            raise RefusedError(
                f"{spec.name}: its parts leave out or repeat elements from byte {position} on; "
                "this is a defect of ParamMap, please report it"
            )
        position = stop
