"""The shards of DeepSpeed's ZeRO-1, ZeRO-2 and BF16 optimizers: where each parameter's states lie
in their flat partitions.

For each group of parameters the partitions of all data-parallel ranks, one after the other, are the
parameters in the order of `param_shapes`, each followed by its alignment padding if there is one,
and at the end padding up to a multiple of 2 · dp. The ZeRO optimizers save the fp32 partitions
without the padding at the end, the moments with it (an elastic checkpoint neither), the BF16
optimizer both with it.

Sources: deepspeed 0.3.17 … 0.19.8 (runtime/zero/stage_1_and_2.py and runtime/bf16_optimizer.py,
state_dict)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parammap.errors import RefusedError
from parammap.formats import torch_zip
from parammap.formats.pickles import Opaque
from parammap.formats.scalars import value_of
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, ITEMSIZE, MAIN_PARAM, Extent, Stored
from parammap.tensors.names import shorten_names

#: elements that each data-parallel rank's partition is a multiple of (stage_1_and_2.py,
#: nccl_start_alignment_factor)
_ALIGNMENT = 2
_MOMENTS = (EXP_AVG, EXP_AVG_SQ)


@dataclass(slots=True)
class States:
    """What the optimizer of one rank of the model keeps: tensors by state and name, `steps` by name
    (a Stored of one element, or a number), and `rest`, the first shard's state without what is cut
    over the shards."""

    tensors: dict[str, dict[str, Stored]] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ZeroShard:
    """A data-parallel rank's file: its fp32 partition and its optimizer's state by group."""

    path: Path
    state: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> ZeroShard:
        content = torch_zip.read(path)
        state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
        if not isinstance(state, dict) or "single_partition_of_fp32_groups" not in state:
            stage_3 = isinstance(state, dict) and "fp32_flat_groups" in state
            raise RefusedError(
                f"{path}: "
                + (
                    "is of ZeRO stage 3; only stages 1 and 2 can be converted"
                    if stage_3
                    else "holds no partitions of ZeRO; convert --weights-only"
                )
            )
        return cls(path, state)

    @property
    def partitions(self) -> list[Stored]:
        return list(self.state["single_partition_of_fp32_groups"])

    def group(self, number: int) -> dict[str, Any]:
        """A group's state. An elastic checkpoint has a list of them."""
        base = self.state["base_optimizer_state"]
        states = base if isinstance(base, list) else base["state"]
        own = (
            (states[number] if number < len(states) else {})
            if isinstance(states, list)
            else states.get(number, {})
        )
        strange = sorted(
            key
            for key, value in own.items()
            if isinstance(value, Stored) and value.shape and key not in _MOMENTS
        )
        if strange:
            raise RefusedError(
                f"{self.path}: its optimizer keeps {shorten_names(strange)}, and only Adam's "
                f"{' and '.join(_MOMENTS)} can be converted; convert --weights-only"
            )
        if missing := [key for key in _MOMENTS if key not in own]:
            raise RefusedError(
                f"{self.path}: group {number} has no {' and no '.join(missing)}; has its optimizer "
                "taken a step, and is it Adam? convert --weights-only"
            )
        return own


def read(model: Path, content: dict[str, Any], paths: list[Path]) -> States:
    """The states of the rank whose mp_rank file holds `content`, from its shards in data-parallel
    order.

    Raises RefusedError for shards that do not fit each other or the parameters' shapes.
    """
    shards = [ZeroShard.read(path) for path in paths]
    shapes = content.get("param_shapes")
    if not shapes:
        raise RefusedError(
            f"{model}: has no param_shapes, without which nobody knows what lies where in "
            f"{paths[0].name}; save with deepspeed 0.4.4 or later, or convert --weights-only"
        )
    shapes = list(shapes) if isinstance(shapes, (list, tuple)) else [shapes]
    states = States({MAIN_PARAM: {}, EXP_AVG: {}, EXP_AVG_SQ: {}}, rest=_rest(shards[0]))
    for shard in shards:
        _check_shard(shard, len(shapes), len(shards))
    for number, group in enumerate(shapes):
        _add_group(states, number, group, shards)
    return states


def _check_shard(shard: ZeroShard, groups: int, dp: int) -> None:
    if len(shard.partitions) != groups:
        raise RefusedError(
            f"{shard.path}: has partitions of {len(shard.partitions)} groups, and the model file "
            f"names parameters of {groups}; these files are of different saves"
        )
    counts = shard.state.get("partition_count") or []
    for count in counts if isinstance(counts, list) else [counts]:
        if count != dp:
            raise RefusedError(
                f"{shard.path}: is one of {count} data-parallel shards, of which {dp} are here; "
                "copy the whole checkpoint"
            )


def _add_group(
    states: States, number: int, shapes: dict[str, tuple[int, ...]], shards: list[ZeroShard]
) -> None:
    gaps = _gaps(shards[0], number, len(shapes))
    places, end = {}, 0
    for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
        places[name] = end, math.prod(shape), tuple(shape)
        end += math.prod(shape) + gap
    groups = [shard.group(number) for shard in shards]
    parts = {
        MAIN_PARAM: [shard.partitions[number] for shard in shards],
        **{state: [group[state] for group in groups] for state in _MOMENTS},
    }
    size = -(-end // (_ALIGNMENT * len(shards))) * _ALIGNMENT
    for state, partitions in parts.items():
        _check_sizes(shards, number, state, partitions, size, end)
        for name, (start, numel, shape) in places.items():
            extents = tuple(_extents(partitions, size, start, numel))
            states.tensors[state][name] = Stored(partitions[0].dtype, shape, extents)
    _check_mappings(shards, number, places, size)
    step = _step(shards, groups, number)
    if step is not None:
        states.steps |= dict.fromkeys(shapes, step)


def _gaps(shard: ZeroShard, number: int, count: int) -> list[int]:
    """The elements of alignment padding behind each parameter (deepspeed 0.17 on; else none)."""
    gaps = shard.state.get("param_alignment_paddings")
    own = list(gaps[number]) if gaps else [0] * count
    if len(own) != count:
        raise RefusedError(
            f"{shard.path}: has alignment paddings of {len(own)} parameters in group {number}, "
            f"which has {count}; these files are of different saves"
        )
    return own


def _check_sizes(
    shards: list[ZeroShard],
    number: int,
    state: str,
    partitions: list[Stored],
    size: int,
    total: int,
) -> None:
    """Refuse unless each partition has `size` elements, or, at the end, those that are no
    padding."""
    for rank, (shard, partition) in enumerate(zip(shards, partitions, strict=True)):
        if not isinstance(partition, Stored) or partition.dtype != partitions[0].dtype:
            raise RefusedError(
                f"{shard.path}: its {state} of group {number} is no tensor as {shards[0].path.name} "
                f"has"
            )
        unpadded = min(max(total - rank * size, 0), size)
        if partition.shape not in ((size,), (unpadded,)):
            raise RefusedError(
                f"{shard.path}: its {state} of group {number} has {list(partition.shape)} "
                f"elements, and the {total} of the group's parameters over {len(shards)} shards "
                f"make {size}; these files are of different saves"
            )


def _extents(partitions: list[Stored], size: int, start: int, numel: int) -> Iterator[Extent]:
    """The bytes of elements [start, start + numel) of the partitions, one after the other."""
    while numel:
        rank, offset = divmod(start, size)
        (extent,) = partitions[rank].extents
        itemsize, count = ITEMSIZE[partitions[rank].dtype], min(numel, size - offset)
        yield Extent(extent.file, extent.offset + offset * itemsize, count * itemsize)
        start, numel = start + count, numel - count


def _check_mappings(
    shards: list[ZeroShard],
    number: int,
    places: dict[str, tuple[int, int, tuple[int, ...]]],
    size: int,
) -> None:
    """Refuse if a shard says itself that its part of a parameter lies elsewhere (deepspeed 0.7
    on)."""
    for rank, shard in enumerate(shards):
        mappings = shard.state.get("param_slice_mappings")
        expected = {}
        for name, (start, numel, _) in places.items() if mappings else ():
            low, high = max(start, rank * size), min(start + numel, (rank + 1) * size)
            if low < high:
                expected[name] = low - rank * size, high - low
        said = {
            name: _address(shard, address)
            for name, address in (mappings[number] if mappings else {}).items()
        }
        if wrong := sorted(
            name for name in {*said, *expected} if said.get(name) != expected.get(name)
        ):
            raise RefusedError(
                f"{shard.path}: its own map says that {shorten_names(wrong)} lies elsewhere than "
                "the model file's shapes do; these files are of different saves"
            )


def _address(shard: ZeroShard, address: Any) -> tuple[int, int]:
    fields = address.attributes if isinstance(address, Opaque) else {}
    if not {"start", "numel"} <= fields.keys():
        raise RefusedError(f"{shard.path}: has a param_slice_mappings that is not DeepSpeed's")
    return fields["start"], fields["numel"]


def _step(shards: list[ZeroShard], groups: list[dict[str, Any]], number: int) -> Any:
    """The steps that a group has taken, as they are kept; None: with the state of the parameters
    they are not."""
    steps = {value_of(group["step"]) for group in groups if "step" in group}
    if len(steps) > 1:
        raise RefusedError(
            f"{shards[0].path}: the shards of group {number} have taken different numbers of steps "
            f"{sorted(steps)}; these files are of different saves"
        )
    return groups[0].get("step")


def _rest(shard: ZeroShard) -> dict[str, Any]:
    """A shard's state without what is cut over the shards: with `param_groups` (deepspeed,
    ds_to_universal.py keeps these very keys)."""
    cut = ("base_optimizer_state", "single_partition_of_fp32_groups", "param_slice_mappings")
    base = shard.state["base_optimizer_state"]
    groups = base.get("param_groups", []) if isinstance(base, dict) else []
    return {
        **{key: value for key, value in shard.state.items() if key not in cut},
        "param_groups": groups,
    }
