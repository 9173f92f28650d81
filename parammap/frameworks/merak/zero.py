"""The optimizer of a Merak run: the flat partitions of ZeRO-1, or an Adam whose state lies in the
model's own file.

ZeRO-1: the parameters of a group follow each other in one flat tensor, zeros at its end, which is
cut into intervals of dp partitions of equal size: partition k is the (k // dp)-th of data-parallel
rank k % dp. `param_shapes` names the parameters of each group in order,
`local_sub_partitions_of_fp32_groups[group][interval]` are a rank's weights in float32, and the base
optimizer's ids number (group, interval).

Groups, in both: the weights that are no LayerNorm's, then the LayerNorms' parameters and all
biases, each in the order of the modules. A tied weight goes by the name of the module that was
registered first, `tied_modules.torch_Size([V, D])`.

Sources: Merak d72efe5 (Merak/utils/zero1_optimizer.py, FP16_DeepSpeedZeroOptimizer_Stage1;
Merak/utils/checkpoint.py, get_zero_param_shapes; Merak/modules/utils.py,
get_params_for_weight_decay_optimization); the same in v2.2.2."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from parammap.errors import RefusedError
from parammap.formats import torch_legacy, tree_schema
from parammap.formats.scalars import value_of
from parammap.formats.tree_schema import count, dict_of, kind, list_of, record
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, ITEMSIZE, MAIN_PARAM, Extent, Stored

TIED = re.compile(r"(?:.*\.)?tied_modules\.[^.]*\.weight")
_NORM = re.compile(r"\.ln_(?:1|2|f)\.")
_MOMENTS = (EXP_AVG, EXP_AVG_SQ)

#: (state, the model's name of the parameter, where it lies)
State = tuple[str, str, Stored]


_TENSOR = kind(Stored)
_ADAM = record(
    {
        "state": dict_of(
            count, record({**dict.fromkeys(_MOMENTS, _TENSOR), "step": kind(int, float, Stored)})
        ),
        "param_groups": list_of(record({"params": list_of(count)}, required=("params",))),
    },
    required=("state", "param_groups"),
)
_STATE = record(
    {
        "local_sub_partitions_of_fp32_groups": list_of(list_of(_TENSOR)),
        "base_optimizer_state": _ADAM,
    },
    required=("local_sub_partitions_of_fp32_groups", "base_optimizer_state"),
)
#: what a ZeRO-1 file holds
_CONTENT = record(
    {"optimizer_state_dict": _STATE, "param_shapes": list_of(dict_of(kind(str), list_of(count)))},
    required=("optimizer_state_dict", "param_shapes"),
)


class AdamState(TypedDict):
    """torch.optim's state dict of an Adam: the state of each parameter by its number, the groups
    of parameters."""

    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class PartitionState(TypedDict):
    """A rank's `optimizer_state_dict`: the partitions by group and interval, and the optimizer that
    steps them."""

    local_sub_partitions_of_fp32_groups: list[list[Stored]]
    base_optimizer_state: AdamState


class Partitions:
    """The ZeRO-1 files of one tensor- and pipeline-parallel rank, in the order of their dp
    ranks."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self.contents = paths, [torch_legacy.read_either(path) for path in paths]
        for path, content in zip(paths, self.contents, strict=True):
            tree_schema.check(content, _CONTENT, path)
            groups, state = len(content["param_shapes"]), content["optimizer_state_dict"]
            lengths = {
                len(state["local_sub_partitions_of_fp32_groups"]),
                len(state["base_optimizer_state"]["param_groups"]),
            }
            if lengths != {groups}:
                raise RefusedError(
                    f"{path}: its optimizer has {max(lengths)} groups and its parameters are in "
                    f"{groups}; the file is damaged"
                )
            if content["param_shapes"] != self.contents[0]["param_shapes"]:
                raise RefusedError(
                    f"{path}: its parameters are not those of {paths[0].name}; these files are of "
                    "different runs"
                )
        self.states: list[PartitionState] = [
            content["optimizer_state_dict"] for content in self.contents
        ]

    @property
    def base(self) -> AdamState:
        """The state dict of the optimizer that steps the partitions, of the first rank."""
        return self.states[0]["base_optimizer_state"]

    def parameters(self) -> Iterator[State]:
        """The weights and, where a step was taken, the moments of each parameter."""
        states = (MAIN_PARAM, *(moment for moment in _MOMENTS if self.base["state"]))
        for number, shapes in enumerate(self.contents[0]["param_shapes"]):
            for state in states:
                yield from self._cut(state, shapes, self._flat(state, number))

    def _flat(self, state: str, group: int) -> list[Stored]:
        """The partitions of a group's flat tensor, one after the other."""
        by_rank = [
            self._partitions(saved, state, group, path)
            for saved, path in zip(self.states, self.paths, strict=True)
        ]
        counts = {tuple(part.numel for part in parts) for parts in by_rank}
        if len(counts) != 1:
            raise RefusedError(
                f"{self.paths[0].parent}: the dp ranks' partitions of group {group} ({state}) are "
                f"not alike: {sorted(counts)}; these files are of different runs"
            )
        return [parts[interval] for interval in range(len(by_rank[0])) for parts in by_rank]

    def _partitions(
        self, saved: PartitionState, state: str, group: int, path: Path
    ) -> list[Stored]:
        if state == MAIN_PARAM:
            return saved["local_sub_partitions_of_fp32_groups"][group]
        base = saved["base_optimizer_state"]
        ids = base["param_groups"][group]["params"]
        if missing := [number for number in ids if state not in base["state"].get(number, {})]:
            raise RefusedError(
                f"{path}: lacks {state} of partition {missing[0]}; convert --weights-only"
            )
        return [base["state"][number][state] for number in ids]

    def _cut(
        self, state: str, shapes: dict[str, tuple[int, ...]], parts: list[Stored]
    ) -> Iterator[State]:
        needed, there = sum(map(math.prod, shapes.values())), sum(part.numel for part in parts)
        if needed > there:
            raise RefusedError(
                f"{self.paths[0]}: {state} has {there} elements in {len(self.paths)} files for "
                f"parameters of {needed}; a file of another run is among them"
            )
        position, itemsize = 0, ITEMSIZE[parts[0].dtype]
        runs = list(_placed(parts))
        for name, shape in shapes.items():
            nbytes = math.prod(shape) * itemsize
            yield (
                state,
                name,
                Stored(parts[0].dtype, tuple(shape), _extents(runs, position, position + nbytes)),
            )
            position += nbytes


def _placed(parts: list[Stored]) -> Iterator[tuple[int, Extent]]:
    """Each extent with the byte of the flat tensor that it begins at."""
    position = 0
    for extent in (extent for part in parts for extent in part.extents):
        yield position, extent
        position += extent.nbytes


def _extents(runs: list[tuple[int, Extent]], low: int, high: int) -> tuple[Extent, ...]:
    return tuple(
        Extent(
            extent.file,
            extent.offset + max(low - start, 0),
            min(high, start + extent.nbytes) - max(low, start),
        )
        for start, extent in runs
        if start < high and low < start + extent.nbytes
    )


def has_state(optimizer: object) -> bool:
    """Whether what a model's file keeps as its optimizer is more than the dummy that the tools
    write."""
    return isinstance(optimizer, dict) and any(
        optimizer[key] for key in optimizer.keys() - {"step", "param_groups"}
    )


def in_model_file(optimizer: object, names: dict[str, Stored]) -> list[State] | None:
    """The moments of a plain torch Adam in the model's file, whose `names` are given in order; None
    if it is of another kind, such as that of FP16_Optimizer, or not of these parameters."""
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
        return None
    groups, expected, found = optimizer.get("param_groups"), _groups(list(names)), []
    if not isinstance(groups, list) or [len(group["params"]) for group in groups] != [
        len(own) for own in expected
    ]:
        return None
    for number, name in zip(
        (n for group in groups for n in group["params"]),
        (n for own in expected for n in own),
        strict=True,
    ):
        own = optimizer["state"].get(number)
        shapes = (
            [own.get(moment, names[name]).shape for moment in _MOMENTS]
            if isinstance(own, dict)
            else []
        )
        if shapes != [names[name].shape] * 2 or not set(_MOMENTS) <= own.keys():
            return None
        found += [(moment, name, own[moment]) for moment in _MOMENTS]
    return found


def _groups(names: list[str]) -> tuple[list[str], list[str]]:
    """The parameters with weight decay and those without. The module that a tied weight was
    registered with comes first, and is not met again at its own place."""
    tied = next((name for name in names if TIED.fullmatch(name)), None)
    words = [name for name in names if name.endswith((".wte.weight", ".lm_head.weight"))]
    met = set(words[:1]) if tied else set()
    left = [name for name in names if name not in met]
    without = [name for name in left if _NORM.search(name) or name.endswith(".bias")]
    return [name for name in left if name not in without], without


def steps(state: AdamState) -> int | None:
    """The steps that the optimizer has taken; None if it has no state. Words to which the head of
    their own stage is tied are among its parameters twice, and so are stepped twice."""
    counts = [
        value_of(step) for own in state["state"].values() if (step := own.get("step")) is not None
    ]
    return int(min(counts)) if counts else None
