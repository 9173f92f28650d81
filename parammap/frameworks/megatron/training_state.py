"""The training state in what a rank of Megatron-LM keeps beside its model, and in the arguments that
frameworks descended from it keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parammap.checkpoint.checkpoint import Coordinates
from parammap.checkpoint.training_state import (
    ParamGroup,
    Schedule,
    TrainingState,
    as_number,
    steps_of,
)
from parammap.formats.scalars import value_of
from parammap.frameworks.megatron.facts import args_of
from parammap.tensors.logical import Stored

#: the dtype that each of --bf16 and --fp16 has the model computed in
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}

_RANDOM_STATES = (
    "random_rng_state",
    "np_rng_state",
    "torch_rng_state",
    "cuda_rng_state",
    "rng_tracker_states",
)


def training_states(
    rank_metadata: Mapping[Coordinates, dict[str, Any]],
) -> dict[Coordinates, TrainingState]:
    """Each rank's training state, by its metadata."""
    return {rank: _training_state(metadata) for rank, metadata in rank_metadata.items()}


def param_groups(optimizer: object) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer's state, those of a chain of optimizers one after the
    other."""
    if isinstance(optimizer, dict) and "optimizer" in optimizer:
        return list((optimizer["optimizer"] or {}).get("param_groups", []))
    if isinstance(optimizer, dict):
        optimizer = list(optimizer.values())
    links = optimizer if isinstance(optimizer, list) else []
    return [group for link in links for group in param_groups(link)]


def said_by(args: Mapping[str, Any]) -> dict[str, Any]:
    """What the arguments of a run say of its training state, by the names of TrainingState."""
    samples, length = args.get("consumed_train_samples"), args.get("seq_length")
    return {
        "consumed_samples": samples,
        "consumed_valid_samples": args.get("consumed_valid_samples"),
        "consumed_tokens": samples * length if samples is not None and length else None,
        "sequence_length": length,
        "weight_decay": args.get("weight_decay"),
        "compute_dtype": compute_dtype(args),
    }


def compute_dtype(switches: Mapping[str, Any]) -> str | None:
    """The dtype by `bf16` and `fp16`; None where neither is recorded."""
    known = [name for name in DTYPES if name in switches]
    return next((DTYPES[name] for name in known if switches[name]), "float32" if known else None)


def random_state_in(content: Mapping[str, Any]) -> object:
    """The random states in a rank's file; older releases, and frameworks descended from these,
    keep them one by one."""
    apart = {name: content[name] for name in _RANDOM_STATES if name in content}
    return content.get("rng_state") or apart or None


def _training_state(metadata: dict[str, Any]) -> TrainingState:
    groups = tuple(map(ParamGroup.of, param_groups(metadata.get("optimizer"))))
    schedule = metadata.get("opt_param_scheduler")
    return TrainingState(
        **said_by(args_of(metadata)),
        iteration=metadata.get("iteration"),
        groups=groups,
        steps=steps_of(groups),
        schedule=Schedule(schedule) if isinstance(schedule, dict) and schedule else None,
        loss_scale=_loss_scale(metadata.get("optimizer")),
        random_state=random_state_in(metadata),
    )


def _loss_scale(optimizer: object) -> float | None:
    """Of the first of a chain of optimizers, which all scale alike."""
    first = optimizer[0] if isinstance(optimizer, list) else optimizer
    scaler = (first.get("grad_scaler") if isinstance(first, dict) else None) or {}
    scale = scaler.get("scale")
    return value_of(scale) if isinstance(scale, Stored) and scale.numel == 1 else as_number(scale)
