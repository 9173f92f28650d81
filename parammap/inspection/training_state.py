"""The training state beside tensors, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from parammap.checkpoint.training_state import TrainingState

_PROGRESS = (
    "consumed_samples",
    "consumed_valid_samples",
    "consumed_tokens",
    "sequence_length",
    "compute_dtype",
)
_GROUP_FACTS = (
    "lr",
    "step",
    "weight_decay",
    "betas",
    "eps",
    "lr_mult",
    "wd_mult",
    "max_lr",
    "min_lr",
    "is_expert_parallel",
)


def progress(state: TrainingState) -> dict[str, Any]:
    """How far the run has come; null for what is not recorded."""
    return {"steps": list(state.steps), **{name: getattr(state, name) for name in _PROGRESS}}


def optimizer(state: TrainingState) -> dict[str, Any]:
    """How the optimizer steps: its class, its scale of the loss, its groups and its schedule."""
    schedule = state.schedule.values if state.schedule else {}
    return {
        "name": state.optimizer,
        "loss_scale": state.loss_scale,
        "groups": [_plain(group.values, _GROUP_FACTS) for group in state.groups],
        "scheduler": _plain(schedule, sorted(schedule)) or None,
    }


def _plain(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of the values that are numbers, words or lists of numbers."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name in names
        if isinstance(value := values.get(name), (bool, int, float, str, tuple))
    }
