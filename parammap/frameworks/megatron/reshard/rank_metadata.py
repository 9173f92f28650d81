"""What a model file holds beside the model, for a rank of the new layout: arguments, parameter
groups, random states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.errors import RefusedError
from parammap.formats.pickles import Opaque
from parammap.tensors.layout import Layout

#: what tells parameter groups apart: whether their weights decay, and whether they have a rate of
#: their own
GroupKind = tuple[bool, bool]
#: an optimizer's state as Megatron-LM saves it, or those of a chain
State = dict[str, Any] | list[dict[str, Any]]
#: a parameter group of experts apart; by its other keys it is one of the dense groups
_OF_EXPERTS = "is_expert_parallel"


@dataclass(frozen=True, slots=True)
class TargetArguments:
    """What arguments can say of the new layout: sizes, layers per chunk in the order in which data
    passes them, rows of the vocabulary."""

    layout: Layout
    chunk_layers: tuple[int, ...]
    padded_vocab: int | None
    divisible_by: int | None

    @property
    def stage_layers(self) -> tuple[int, ...]:
        """Layers per stage, summed over its chunks."""
        return tuple(sum(self.chunk_layers[pp :: self.layout.pp]) for pp in range(self.layout.pp))

    @property
    def is_even(self) -> bool:
        return len(set(self.chunk_layers)) == 1

    @property
    def is_even_inside(self) -> bool:
        """Whether only the first and the last stage differ from the others, and each stage's chunks
        are alike."""
        alike = all(
            len(set(self.chunk_layers[pp :: self.layout.pp])) == 1 for pp in range(self.layout.pp)
        )
        return alike and all(self.stage_layers) and len(set(self.stage_layers[1:-1])) <= 1


def _first(target: TargetArguments) -> int | None:
    return None if target.is_even or not target.is_even_inside else target.stage_layers[0]


def _last(target: TargetArguments) -> int | None:
    return None if target.is_even or not target.is_even_inside else target.stage_layers[-1]


def _stages(target: TargetArguments) -> str | None:
    """Stage by stage, as --pipeline-model-parallel-layout takes it, where nothing less says it."""
    chunks = ["t" * layers for layers in target.chunk_layers]
    return (
        None
        if target.is_even_inside
        else "|".join(["E" + chunks[0], *chunks[1:-1], chunks[-1] + "L"])
    )


def _vpp(target: TargetArguments) -> int | None:
    return target.layout.vpp if target.layout.vpp > 1 else None


def _chunks_per_stage(target: TargetArguments) -> int | None:
    """Where neither layers per chunk nor a list of stages says it: Megatron-LM takes no more than
    one of the three."""
    return None if _first(target) is None else _vpp(target)


def _layers_per_chunk(target: TargetArguments) -> int | None:
    return (
        target.stage_layers[0] // target.layout.vpp
        if target.layout.vpp > 1 and target.is_even
        else None
    )


def _world(target: TargetArguments) -> int:
    return target.layout.tp * target.layout.pp * target.layout.cp * target.layout.dp


#: arguments that say the layout (Megatron-LM, training/arguments.py, core_r0.6.0 … main; Yuan-2.0):
#: set where they exist
ARGUMENTS: dict[str, Callable[[TargetArguments], object]] = {
    "tensor_model_parallel_size": lambda target: target.layout.tp,
    "pipeline_model_parallel_size": lambda target: target.layout.pp,
    "transformer_pipeline_model_parallel_size": lambda target: target.layout.pp,
    "virtual_pipeline_model_parallel_size": _vpp,
    "num_layers_per_virtual_pipeline_stage": _layers_per_chunk,
    "num_virtual_stages_per_pipeline_rank": _chunks_per_stage,
    "expert_model_parallel_size": lambda target: target.layout.ep,
    "expert_tensor_parallel_size": lambda target: target.layout.etp,
    "context_parallel_size": lambda target: target.layout.cp,
    "data_parallel_size": lambda target: target.layout.dp,
    "world_size": _world,
    "decoder_first_pipeline_num_layers": _first,
    "decoder_last_pipeline_num_layers": _last,
    "pipeline_model_parallel_layout": _stages,
    "account_for_embedding_in_pipeline_split": lambda target: False,
    "account_for_loss_in_pipeline_split": lambda target: False,
    "standalone_embedding_stage": lambda target: False,
    "padded_vocab_size": lambda target: target.padded_vocab,
    "make_vocab_size_divisible_by": lambda target: target.divisible_by,
    "pipeline_model_parallel_method": lambda target: "uniform" if target.is_even else "block",
    "pipeline_model_parallel_blocks": lambda target: ",".join(map(str, target.stage_layers)),
    "pipeline_blocks": lambda target: list(target.stage_layers),
}


def nearest(source: Checkpoint, layout: Layout, rank: Coordinates) -> Coordinates:
    """The source's rank whose place is most like that of a rank of `layout`: first stage goes with
    first, last with last."""
    tp, pp, ep = rank
    there = source.layout
    stage = there.pp - 1 if pp == layout.pp - 1 else min(pp, max(there.pp - 2, 0))
    return tp % there.tp, stage, ep % there.ep


def check_stages(args: dict[str, Any], any_stages: bool, target: TargetArguments) -> None:
    """Refuse stages that the release which saved could not be told: any, only other ends, or none
    at all. Bare megatron-core, without `args`, is told by hand."""
    says_all = any_stages or "pipeline_model_parallel_blocks" in args
    if (
        args
        and not target.is_even
        and not says_all
        and not (target.is_even_inside and "decoder_first_pipeline_num_layers" in args)
    ):
        ends = (
            "only the first and the last stage"
            if "decoder_first_pipeline_num_layers" in args
            else "no stage"
        )
        raise RefusedError(
            f"stages of {list(target.stage_layers)} layers: in the release that saved, {ends} may "
            "differ from the others; choose --stage-layers anew"
        )


def resharded_metadata(
    source: Checkpoint,
    target: TargetArguments,
    rank: Coordinates,
    expert_dims: set[int],
    needed: list[GroupKind],
) -> dict[str, Any]:
    """The metadata of a rank; `expert_dims` are the numbers of dimensions that its experts'
    parameters have, `needed` the kinds of its dense parameter groups where they come in an order of
    its own."""
    meta = dict(source.rank_metadata[nearest(source, target.layout, rank)])
    if "args" in meta:
        meta["args"] = _relaid_args(meta["args"], target, rank)
    if meta.get("optimizer") is not None:
        optimizer = _in_order(
            meta["optimizer"],
            needed,
            [one.get("optimizer") for one in source.rank_metadata.values()],
        )
        meta["optimizer"] = regrouped(optimizer, target.layout.ep > 1, expert_dims)
    return meta


def _relaid_args(args: object, target: TargetArguments, rank: Coordinates) -> object:
    if not isinstance(args, Opaque) or not isinstance(args.state, dict):
        return args
    known = {name: say(target) for name, say in ARGUMENTS.items() if name in args.state}
    if "rank" in args.state:
        known["rank"] = target.layout.first_rank(*rank)
    return replace(
        args,
        state={
            **args.state,
            **{
                name: value
                for name, value in known.items()
                if value is not None or args.state[name] is not None
            },
        },
    )


def regrouped(optimizer: State, to_be_apart: bool, expert_dims: set[int]) -> State:
    """The optimizer's state, where experts come to have, or no longer have, an optimizer of their
    own; `expert_dims` are the numbers of dimensions that their parameters have."""
    if isinstance(optimizer, list) == to_be_apart or not expert_dims:
        return optimizer
    if isinstance(optimizer, list):
        dense, experts = optimizer
        if _values(experts) - _values(dense):
            raise RefusedError(
                "the experts' parameter groups have other rates or steps than the dense ones, but "
                "share their optimizer where ep is 1; keep ep above 1"
            )
        return dense
    groups = _groups(optimizer)
    of_experts = [
        {**group, _OF_EXPERTS: True}
        for group in groups
        if ({1} if group.get("wd_mult") == 0.0 else {2, 3}) & expert_dims
    ]
    return [
        optimizer,
        {**optimizer, "optimizer": {**optimizer["optimizer"], "param_groups": of_experts}},
    ]


def _in_order(optimizer: State, needed: list[GroupKind], others: list[State | None]) -> State:
    """The optimizer's state with its dense groups as `needed`; those that it lacks are taken from
    the other ranks'. Groups that differ in more than their kind stay as they are."""
    dense = _dense(optimizer)
    if not needed or not dense:
        return optimizer
    own = {_kind(group): group for group in _groups(dense)}
    if len(own) != len(_groups(dense)):
        return optimizer
    known = {
        _kind(group): group for other in map(_dense, others) if other for group in _groups(other)
    } | own
    groups = [known[kind] for kind in needed if kind in known]
    ordered = {**dense, "optimizer": {**dense["optimizer"], "param_groups": groups}}
    return [ordered, *optimizer[1:]] if isinstance(optimizer, list) else ordered


def _dense(optimizer: State | None) -> dict[str, Any] | None:
    return optimizer[0] if isinstance(optimizer, list) else optimizer


def _kind(group: dict[str, Any]) -> GroupKind:
    return group.get("wd_mult") != 0.0, bool(group.get("is_decoupled_lr"))


def _groups(optimizer: dict[str, Any]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = optimizer["optimizer"]["param_groups"]
    return groups


def _values(optimizer: dict[str, Any]) -> set[str]:
    """What steps the groups' parameters, but for whose they are."""
    return {
        repr(sorted((key, value) for key, value in group.items() if key != _OF_EXPERTS))
        for group in _groups(optimizer)
    }
