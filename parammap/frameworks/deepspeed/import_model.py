"""What a checkpoint of another framework is to Megatron-DeepSpeed: a pipeline's GPT or BLOOM, its
optimizer, its arguments.

A resumed run takes from the mp_rank file the counters, the scheduler and the arguments' sample
counts, from the optimizer's state all that a group of parameters has but its parameters.
BigScience's optimizer has three groups, of which the last is not decayed, others have two
(megatron/optimizer/__init__.py); so each group here is the same, and none says how to decay.

Sources: deepspeed 0.19.8 (runtime/base_optimizer.py, load_hp_checkpoint_state_from_checkpoint_dir;
engine.py, _common_checkpoint_state), bigscience-workshop/Megatron-DeepSpeed 8387ae1
(megatron/checkpointing.py, learning_rates.py)."""

from __future__ import annotations

from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.training_state import TrainingState
from parammap.errors import RefusedError
from parammap.families import BLOOM, DEEPSPEED, GPT2, HEAD, WORD_EMBEDDING, Architecture
from parammap.formats.pickles import Global, Opaque
from parammap.frameworks.architecture import architecture_for
from parammap.frameworks.deepspeed.layers import EMBEDDING, NORM, optimizer_name
from parammap.frameworks.deepspeed.universal import SCHEDULER, UniversalContents, UniversalParameter
from parammap.frameworks.megatron.training_state import DTYPES
from parammap.plan.source_tensors import SourceTensors
from parammap.tensors.arrangement import Sizes
from parammap.tensors.logical import EXP_AVG, MAIN_PARAM
from parammap.tensors.names import shorten_names

#: the release whose form this is
_VERSION = "0.19.8"
_GROUPS = 3
#: what a group says of Adam, beside how its weights decay
_GROUP_KEYS = ("lr", "betas", "eps", "bias_correction")
#: the numbers of the first layer's function, and how many stand between the last one's and the
#: final norm's
_EMBEDDING, _FIRST_LAYER, _TO_NORM = 1, 3, 2


def contents(source: Checkpoint) -> UniversalContents:
    """What the universal checkpoint is made of. Raises RefusedError for a model that
    Megatron-DeepSpeed does not have, and for parameters that no optimizer steps."""
    model = architecture_for(source, (GPT2, BLOOM), "Megatron-DeepSpeed")
    states = SourceTensors(source)
    _check(source, model, states)
    functions = {
        _EMBEDDING: EMBEDDING,
        **{_FIRST_LAYER + i: f"layers.{i}" for i in range(source.num_layers)},
        _FIRST_LAYER + source.num_layers - 1 + _TO_NORM: NORM,
    }
    parameters = [
        UniversalParameter(optimizer_name(one.name, functions), one.canonical, one.kind, one.shape)
        for one in states.parameters(DEEPSPEED)
    ]
    groups = _groups(source)
    steps = {one.name: groups[0]["step"] for one in parameters}
    state = {"param_groups": groups, "ds_version": _VERSION}
    return UniversalContents(
        parameters,
        Sizes(model.heads, model.groups, states.vocab_rows),
        steps,
        state,
        {"mp_rank_00_model_states.pt": _model(source, model, states)},
        {},
    )


def _check(source: Checkpoint, model: Architecture, states: SourceTensors) -> None:
    reasons = {
        "its number of attention heads is not recorded": model.heads is None,
        f"its head, {HEAD}, is not the word embedding": model.tied is False
        or HEAD in states.names(),
        "its linear maps have no biases": model.bias is False,
        f"its {model.heads} heads share {model.groups} of keys and values": model.groups
        != model.heads,
    }
    for reason in (reason for reason, applies in reasons.items() if applies):
        raise RefusedError(f"{source.folder}: cannot be Megatron-DeepSpeed's: {reason}")
    if still := sorted(name for name in states.names() if (EXP_AVG, name) not in states.tensors):
        raise RefusedError(
            f"{source.folder}: {len(still)} parameters have no optimizer's states, and DeepSpeed "
            f"does not resume without: {shorten_names(still)}"
        )


def _groups(source: Checkpoint) -> list[dict[str, Any]]:
    """The optimizer's groups, all as the source's first is; the steps are those that all have
    taken."""
    groups = source.training_state.groups
    if not groups or groups[0].lr is None:
        raise RefusedError(
            f"{source.folder}: keeps no param_groups of its optimizer, without whose steps Adam "
            f"cannot go on"
        )
    own = {key: value for key in _GROUP_KEYS if (value := getattr(groups[0], key)) is not None}
    return [{**own, "step": source.steps_taken(), "params": []} for _ in range(_GROUPS)]


def _model(source: Checkpoint, model: Architecture, states: SourceTensors) -> dict[str, Any]:
    state = source.training_state
    tokens = {} if state.consumed_tokens is None else {"tokens": state.consumed_tokens}
    rows = states.tensor(MAIN_PARAM, WORD_EMBEDDING).rows
    return {
        "module": None,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": _scheduler(state),
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": source.iteration,
        "global_samples": state.consumed_samples or 0,
        "dp_world_size": source.layout.dp,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {},
        "ds_version": _VERSION,
        "args": _args(state, model),
        "checkpoint_version": 3.0,
        "iteration": source.iteration,
        **tokens,
        "checkpoint_info": {"padded_vocab_size": rows, "original_vocab_size": rows},
    }


def _scheduler(state: TrainingState) -> dict[str, Any] | None:
    """The state of AnnealingLR, which counts samples as Megatron-LM's scheduler does."""
    if state.schedule is None:
        return None
    known = state.schedule.values
    tokens = {} if state.consumed_tokens is None else {"num_tokens": state.consumed_tokens}
    return {**{own: known[name] for name, own in SCHEDULER.items() if name in known}, **tokens}


def _args(state: TrainingState, model: Architecture) -> Opaque:
    """The arguments by which the model is known again, how its weights decay, the samples that were
    consumed; plain values only."""
    activation = (
        {}
        if model.activation is None
        else {"openai_gelu": model.activation == "gelu_new", "bias_gelu_fusion": False}
    )
    dtype = state.compute_dtype
    known = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "kv_channels": model.head_size,
        "max_position_embeddings": model.positions,
        "padded_vocab_size": model.vocab,
        "layernorm_epsilon": model.eps,
        "seq_length": state.sequence_length,
        **{name: dtype and dtype == DTYPES[name] for name in DTYPES},
        "weight_decay": state.weight_decay,
        "consumed_train_samples": state.consumed_samples or 0,
        "consumed_valid_samples": state.consumed_valid_samples or 0,
    }
    told = {name: value for name, value in known.items() if value is not None}
    return Opaque(
        Global("argparse", "Namespace"),
        (),
        new=True,
        state={
            **told,
            **activation,
            "glu_activation": None,
            "embed_layernorm": model.family == BLOOM,
            "position_embedding_type": "alibi" if model.family == BLOOM else "absolute",
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
        },
    )
