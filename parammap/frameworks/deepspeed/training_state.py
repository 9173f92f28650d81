"""The training state in what a rank of DeepSpeed keeps beside its model: its optimizer's groups and
scale, its scheduler, and the arguments of Megatron-DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from parammap.checkpoint.training_state import ParamGroup, Schedule, TrainingState, steps_of
from parammap.formats.pickles import Opaque
from parammap.formats.scalars import value_of
from parammap.frameworks.deepspeed.universal import SCHEDULER
from parammap.frameworks.deepspeed.zero import States
from parammap.frameworks.megatron.facts import args_of
from parammap.frameworks.megatron.training_state import (
    DTYPES,
    compute_dtype,
    random_state_in,
    said_by,
)


def iteration_of(content: dict[str, Any]) -> int:
    """Of an mp_rank file."""
    return int(content.get("iteration") or content.get("global_steps") or 0)


def training_state(content: dict[str, Any], states: States) -> TrainingState:
    """Of a rank: `content` is its mp_rank file, `states` what is read of its optimizer."""
    args = args_of(content)
    said, dtype = said_by(args), _compute_dtype(content.get("ds_config") or {}, args)
    groups, scaler = tuple(_groups(content, states)), states.rest.get("loss_scaler")
    return TrainingState(
        **said
        | {
            "compute_dtype": dtype,
            "consumed_tokens": content.get("tokens", said["consumed_tokens"]),
        },
        iteration=iteration_of(content),
        groups=groups,
        steps=steps_of(groups),
        schedule=None if args.get("lr_decay_tokens") else _schedule(content.get("lr_scheduler")),
        loss_scale=scaler.attributes.get("cur_scale")
        if isinstance(scaler, Opaque) and dtype == "float16"
        else None,
        random_state=random_state_in(content),
    )


def shapes_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The shapes of the parameters that an mp_rank file's rank steps, by group."""
    shapes = content.get("param_shapes") or []
    return list(shapes) if isinstance(shapes, (list, tuple)) else [shapes]


def _compute_dtype(config: dict[str, Any], args: dict[str, Any]) -> str | None:
    switches = {
        name: config.get(name, {}).get("enabled") or args.get(name)
        for name in DTYPES
        if name in config or name in args
    }
    return compute_dtype(switches)


def _schedule(scheduler: object) -> Schedule | None:
    """What Megatron-LM's scheduler would say; None for one of another kind."""
    state = scheduler if isinstance(scheduler, dict) else {}
    known = {name: state[own] for name, own in SCHEDULER.items() if own in state}
    return Schedule(known) if known else None


def _groups(content: dict[str, Any], states: States) -> Iterator[ParamGroup]:
    """The optimizer's groups, with the steps that the first parameter of each has taken, where that
    is known."""
    groups = states.rest["param_groups"] if states.tensors else []
    for group, names in zip_longest(groups, shapes_of(content)[: len(groups)]):
        step = states.steps.get(next(iter(names or ()), ""))
        taken = {} if step is None else {"step": int(value_of(step))}
        yield ParamGroup.of({**taken, **group})
