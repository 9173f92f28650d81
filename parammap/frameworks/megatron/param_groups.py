"""The parameter groups of Megatron-LM's optimizers, and the steps that they have taken."""

from __future__ import annotations

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError


def param_groups(optimizer: object) -> list[dict]:
    """The parameter groups of an optimizer's state, those of a chain of optimizers one after the
    other."""
    if isinstance(optimizer, dict) and "optimizer" in optimizer:
        return list((optimizer["optimizer"] or {}).get("param_groups", []))
    links = optimizer.values() if isinstance(optimizer, dict) else optimizer or []
    return [
        group for link in links if isinstance(link, (dict, list)) for group in param_groups(link)
    ]


def steps_taken(source: Checkpoint, groups: list[dict]) -> int:
    """The steps that all parameters of a checkpoint have taken; the iteration where no group says.
    Raises RefusedError where groups differ."""
    steps = {group["step"] for group in groups if isinstance(group.get("step"), (int, float))}
    if len(steps) > 1:
        raise RefusedError(
            f"{source.folder}: parameters have taken different numbers of steps {sorted(steps)}"
        )
    return int(steps.pop()) if steps else source.iteration
