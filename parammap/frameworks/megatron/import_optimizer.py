"""Another framework's optimizer as megatron-core's distributed one: parameter groups, schedule, and
what a sidecar says.

Adam's moments belong to parameters in every framework; what is made here is what stands beside
them. Groups have the keys that core 0.16.1 saves and tells groups apart by; matrices decay, biases
and whatever has one dimension do not. Buckets are those of a run without --overlap-grad-reduce, in
the release's own rule (buckets.py).

Sources: megatron-core 0.16.1, core/optimizer/__init__.py (_get_param_groups),
core/optimizer/distrib_optimizer.py (load_state_dict), core/optimizer_param_scheduler.py
(load_state_dict)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.sidecar import SCHEMA, VERSION, Buffer, RankSidecar, Sidecar, Slot
from parammap.checkpoint.training_state import TrainingState
from parammap.errors import RefusedError
from parammap.frameworks.megatron.training_state import DTYPES
from parammap.plan.source_tensors import SourceTensors
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, MAIN_PARAM, MODEL_PARAM, TensorSpec
from parammap.tensors.names import shorten_names

CORE = "0.16.1"
STATES = (MAIN_PARAM, EXP_AVG, EXP_AVG_SQ)
_RANK = (0, 0, 0)
_HYPER = ("lr", "betas", "eps")
#: what the scheduler of megatron-core does not load without
_SCHEDULE = ("max_lr", "min_lr", "lr_warmup_steps", "lr_decay_steps", "lr_decay_style", "num_steps")
#: what a layout file says of the model
_FACTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "vocab_size",
    "padded_vocab_size",
    "make_vocab_size_divisible_by",
    "max_position_embeddings",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "swiglu",
    "num_experts",
    "untie_embeddings_and_output_weights",
)


def check(states: SourceTensors) -> None:
    """Refuse a source that has no moments of some of its parameters."""
    for state in (EXP_AVG, EXP_AVG_SQ):
        if still := sorted(name for name in states.names() if (state, name) not in states.tensors):
            raise RefusedError(
                f"{states.source.folder}: {len(still)} parameters have no {state}, and "
                f"Megatron-LM's optimizer steps all: {shorten_names(still)}; convert --weights-only"
            )


def model_dtype(states: SourceTensors, name: str, recorded: str | None) -> str:
    """The dtype that a tensor is computed in: that of the copy beside what the optimizer steps,
    else as recorded of the run."""
    if copy := states.tensors.get((MODEL_PARAM, name)):
        return copy.dtype
    return (
        recorded
        if recorded and states.source.with_optimizer
        else states.tensor(MAIN_PARAM, name).dtype
    )


def meta(source: Checkpoint) -> dict[str, Any]:
    """`optimizer` and `opt_param_scheduler` of a model file, lr in units per step, counts of the
    scheduler in samples.

    Raises RefusedError for groups that Megatron-LM's two cannot be.
    """
    state = source.training_state
    groups = state.groups
    if not groups or any(getattr(group, key) is None for group in groups for key in _HYPER):
        raise RefusedError(
            f"{source.folder}: keeps no {', '.join(_HYPER)} of its optimizer's param_groups, "
            "without which Adam cannot go on; convert --weights-only"
        )
    decays = {group.weight_decay for group in groups if group.weight_decay}
    for what, values in (
        *((key, {getattr(group, key) for group in groups}) for key in _HYPER),
        ("weight_decay", decays),
    ):
        if len(values) > 1:
            raise RefusedError(
                f"{source.folder}: its parameter groups have different {what} {sorted(values)}, "
                "and Megatron-LM keeps one; convert --weights-only"
            )
    own = {
        "bias_correction": groups[0].bias_correction is not False,
        **{key: getattr(groups[0], key) for key in _HYPER},
    }
    schedule = _schedule(state)
    rates = {key: schedule[key] for key in ("max_lr", "min_lr")} if schedule else {}
    step, decay = source.steps_taken(), max(decays, default=_recorded_decay(state))
    kinds = [
        {
            "is_expert_parallel": False,
            "default_config": True,
            "wd_mult": mult,
            "lr_mult": 1.0,
            "is_decoupled_lr": False,
            **rates,
            **own,
            **({} if decay is None else {"weight_decay": mult * decay}),
            "step": step,
        }
        for mult in (1.0, 0.0)
    ]
    return {
        "optimizer": {"optimizer": {"param_groups": kinds}},
        "opt_param_scheduler": schedule or _constant(state),
    }


def _recorded_decay(state: TrainingState) -> float | None:
    """How weights decay where no group does: as the run says, or not at all where groups say so."""
    of_groups = any(group.weight_decay is not None for group in state.groups)
    return 0.0 if state.weight_decay is None and of_groups else state.weight_decay


def _schedule(state: TrainingState) -> dict[str, Any] | None:
    known = state.schedule.values if state.schedule else {}
    return {key: known[key] for key in _SCHEDULE} if known.keys() >= set(_SCHEDULE) else None


def _constant(state: TrainingState) -> dict[str, Any]:
    """The schedule of a run that has none, or one that Megatron-LM does not know."""
    rate, samples = state.groups[0].lr, state.consumed_samples or 0
    return {
        "max_lr": rate,
        "min_lr": rate,
        "lr_warmup_steps": 0,
        "lr_decay_steps": max(samples, 1),
        "lr_decay_style": "constant",
        "num_steps": samples,
    }


def args(source: Checkpoint) -> dict[str, Any]:
    """The arguments that say how far the run has come, and how it steps."""
    state = source.training_state
    return {
        "iteration": source.iteration,
        "consumed_train_samples": state.consumed_samples or 0,
        "consumed_valid_samples": state.consumed_valid_samples or 0,
        "optimizer": "adam",
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": False,
        "accumulate_allreduce_grads_in_fp32": True,
        "no_save_optim": None,
        "no_save_rng": True,
    }


def flags(told: dict[str, Any]) -> list[str]:
    """What the command line of a run that goes on must say, by its arguments."""
    return [
        *(f"--{name}" for name in DTYPES if told[name]),
        "--use-distributed-optimizer",
        "--accumulate-allreduce-grads-in-fp32",
        "--no-load-rng",
    ]


def sidecar(source: Checkpoint, told: dict[str, Any], specs: Iterable[TensorSpec]) -> Sidecar:
    """What is known of one rank's parameters by the arguments `told`: all are stepped; where they
    lie is for the rule."""
    layout = {
        "schema": SCHEMA,
        "version": VERSION,
        "iteration": source.iteration,
        "checkpoint_format": "torch",
        "framework": {"name": "megatron", "core_version": CORE, "torch_version": ""},
        "parallel": {
            **dict.fromkeys(("tp", "pp", "vpp", "ep", "etp", "cp", "dp", "world_size"), 1),
            "order": "tp-cp-ep-dp-pp",
        },
        "model": {
            **{name: told[name] for name in _FACTS},
            "layernorm_epsilon": told["norm_epsilon"],
        },
    }
    by_dtype: dict[str, list[Slot]] = {}
    for spec in reversed([*specs]):
        by_dtype.setdefault(spec.dtype, []).append(
            Slot(spec.name, spec.shape, spec.dtype, 0, math.prod(spec.shape), 0)
        )
    buffers = tuple(
        Buffer(0, dtype, "float32", None, tuple(slots)) for dtype, slots in by_dtype.items()
    )
    return Sidecar(
        source.folder,
        {_RANK: RankSidecar((buffers,), layout)},
        complete=True,
        iteration=source.iteration,
    )


def notes(source: Checkpoint, dtype: str) -> Iterator[str]:
    yield (
        f"the optimizer goes on from step {source.iteration}: in torch format its buckets are "
        f"those of megatron-core "
        f"{CORE} without --overlap-grad-reduce; any other run takes --to megatron-dist"
    )
    if not _schedule(source.training_state):
        yield (
            "the learning rate's schedule is none of Megatron-LM's, or not recorded: it is "
            "written as constant; --override-opt_param-scheduler takes the flags' own"
        )
    if dtype == "float16":
        yield "the loss scale begins anew"
