"""Comparing what two checkpoints say of their training beside tensors."""

from __future__ import annotations

from collections.abc import Iterator

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.training_state import TrainingState

#: what two records of a run agree on, whatever its layout
_COUNTERS = ("iteration", "steps", "consumed_samples", "consumed_valid_samples", "loss_scale")


def training_state_differences(a: Checkpoint, b: Checkpoint) -> list[str]:
    """What the two say differently of how far the run has come and of how it steps, one line each.

    Parameter groups and schedule only where both have the same ranks: another layout may number the
    groups otherwise. What one side does not record is not compared, nor, of weights alone, any
    count but the iteration."""
    mine, theirs = a.training_state, b.training_state
    names = _COUNTERS if a.with_optimizer and b.with_optimizer else _COUNTERS[:1]
    pairs = {name: (getattr(mine, name), getattr(theirs, name)) for name in names}
    lines = dict.fromkeys(
        f"{name}: {_told(one)} and {_told(other)}"
        for name, (one, other) in pairs.items()
        if one != other and not {None, ()} & {one, other}
    )
    if a.training_states.keys() == b.training_states.keys():
        for rank, state in a.training_states.items():
            lines |= dict.fromkeys(_differences_of_rank(state, b.training_states[rank]))
    return list(lines)


def _told(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _differences_of_rank(a: TrainingState, b: TrainingState) -> Iterator[str]:
    if a.groups and b.groups:
        groups = [[group.values for group in state.groups] for state in (a, b)]
        yield from _tree_differences(groups[0], groups[1], "groups")
    if a.schedule and b.schedule:
        yield from _tree_differences(a.schedule.values, b.schedule.values, "schedule")


def _tree_differences(a: object, b: object, path: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from _tree_differences(a.get(key), b.get(key), f"{path}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from _tree_differences(one, other, f"{path}[{number}]")
    elif isinstance(a, (bool, int, float, str, type(None))) and a != b and not (a != a and b != b):
        yield f"{path}: {a!r} and {b!r}"
