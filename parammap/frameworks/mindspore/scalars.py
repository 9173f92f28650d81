"""The scalars of a training state, with the names and exact types that MindSpeed-Core-MS (r0.1.0)
loads.

Its loader assigns `state_step` in place into a float32 tensor of one element, takes `.item()` of
the float64 ones and `int(.item())` of the int64 ones, and ignores the rest."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from parammap.checkpoint.training_state import Number, TrainingState, as_number
from parammap.errors import RefusedError
from parammap.formats.pickles import Opaque
from parammap.tensors.logical import TensorSpec

LR_DECAY_STYLES = ["constant", "WSD", "linear", "cosine", "inverse-square-root"]
WD_INCR_STYLES = ["constant", "linear", "cosine"]
#: float32 counts exactly up to here
MAX_STEP = 1 << 24

_STYLES = {"lr_decay_style": LR_DECAY_STYLES, "wd_incr_style": WD_INCR_STYLES}
_INTEGERS = {"lr_warmup_steps", "num_steps", "lr_decay_steps", "wd_incr_steps"}
_RENAMED = {"lr": "learning_rate"}


@dataclass(slots=True)
class Scalars:
    """The scalars as tensors with their content; `left_out` names what has no place there, and
    why."""

    specs: list[TensorSpec] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def float64(self, name: str, value: float) -> None:
        self.specs.append(TensorSpec(name, "float64", (), struct.pack("<d", value)))

    def int64(self, name: str, value: float) -> None:
        if int(value) != value:
            self.left_out[name] = f"{value} is cut to {int(value)}: the loader takes an integer"
        self.specs.append(TensorSpec(name, "int64", (), struct.pack("<q", int(value))))


def scalars_of(state: TrainingState, iteration: int) -> Scalars:
    """The scalars of a rank's training state. Raises RefusedError for a step that float32 cannot
    count exactly."""
    scalars = Scalars()
    for number, group in enumerate(state.groups):
        for key, value in group.values.items():
            if key != "step":
                _group_value(scalars, f"{_RENAMED.get(key, key)}_group_{number}", value)
    if state.steps:
        _step(scalars, state.steps)
    for key, value in (state.schedule.values if state.schedule else {}).items():
        _scheduler_value(scalars, key, value)
    scalars.int64("step_num", iteration)
    scalars.int64("epoch_num", 0)
    return scalars


def _step(scalars: Scalars, steps: tuple[Number, ...]) -> None:
    if len(steps) > 1:
        raise RefusedError(
            f"parameter groups have taken different numbers of steps {list(steps)}; "
            "MindSpeed-Core-MS keeps one for all"
        )
    (step,) = steps
    if step > MAX_STEP:
        raise RefusedError(
            f"step {step:.0f} is above {MAX_STEP}, which MindSpeed-Core-MS cannot keep exactly in "
            f"float32"
        )
    scalars.specs.append(TensorSpec("state_step", "float32", (1,), struct.pack("<f", step)))


def _group_value(scalars: Scalars, name: str, value: object) -> None:
    number = as_number(value)
    if number is None:
        scalars.left_out[name] = f"{value!r} is no number"
    else:
        scalars.float64(name, number)


def _scheduler_value(scalars: Scalars, key: str, value: object) -> None:
    number = as_number(value)
    if key in _STYLES:
        if value not in _STYLES[key]:
            raise RefusedError(
                f"opt_param_scheduler: {key} {value!r} is none of {', '.join(_STYLES[key])}"
            )
        scalars.int64(key, _STYLES[key].index(value))
    elif number is None:
        scalars.left_out[key] = f"{value!r} is no number"
    elif key in _INTEGERS:
        scalars.int64(key, number)
    else:
        scalars.float64(key, float(number))


def updated(meta: dict[str, Any], scalars: dict[str, float]) -> dict[str, Any]:
    """A copy of `meta` in which what MindSpore counted on is as its scalars say: step, iteration,
    rates, schedule.

    A value that the scalar repeats, as far as the scalar's type can, is kept as it was.
    """
    result = {**meta, "iteration": int(scalars.get("step_num", meta.get("iteration") or 0))}
    numbers = iter(range(1 << 20))
    result["optimizer"] = _updated_groups(meta.get("optimizer"), scalars, numbers)
    if isinstance(meta.get("opt_param_scheduler"), dict):
        result["opt_param_scheduler"] = {
            key: _updated(key, key, value, scalars)
            for key, value in meta["opt_param_scheduler"].items()
        }
        _count_samples(result, result["opt_param_scheduler"], meta["opt_param_scheduler"])
    return result


def _count_samples(result: dict[str, Any], now: dict[str, Any], before: dict[str, Any]) -> None:
    """Add the samples trained on since (Megatron-LM's scheduler counts samples as its steps) to
    args."""
    args, since = result.get("args"), now.get("num_steps", 0) - before.get("num_steps", 0)
    if (
        since
        and isinstance(args, Opaque)
        and isinstance(args.state, dict)
        and "consumed_train_samples" in args.state
    ):
        samples = args.state["consumed_train_samples"] + since
        result["args"] = replace(args, state={**args.state, "consumed_train_samples": samples})


def _updated_groups(optimizer: object, scalars: dict[str, float], numbers: Iterator[int]) -> object:
    """The optimizer's state with its parameter groups updated, counted through a chain of
    optimizers."""
    if isinstance(optimizer, list):
        return [_updated_groups(link, scalars, numbers) for link in optimizer]
    if not isinstance(optimizer, dict):
        return optimizer
    if "param_groups" not in optimizer:
        return {key: _updated_groups(value, scalars, numbers) for key, value in optimizer.items()}
    groups = [
        {
            key: _updated(
                key,
                "state_step" if key == "step" else f"{_RENAMED.get(key, key)}_group_{number}",
                value,
                scalars,
            )
            for key, value in group.items()
        }
        for group, number in zip(optimizer["param_groups"], numbers, strict=False)
    ]
    return {**optimizer, "param_groups": groups}


def _updated(key: str, name: str, value: object, scalars: dict[str, float]) -> object:
    if name not in scalars:
        return value
    there = scalars[name]
    if key in _STYLES:
        return _STYLES[key][int(there)]
    if not isinstance(value, (bool, int, float)):
        return value
    if there == value or (key in _INTEGERS and there == int(value)):
        return value
    return type(value)(there)
