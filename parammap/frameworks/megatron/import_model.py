"""A model of another framework as a checkpoint of megatron-core: one rank, from which any layout
can be made.

With the optimizer where the source has one (adopt_optimizer.py); without, it is a release as
Megatron-LM's own tools make.

Names are those of Transformer Engine's layers, as Megatron-LM builds them by default, or of its own
ones (--transformer-impl local); see specification.py. Arguments are those that it compares and
takes over when it loads (training/checkpointing.py, check_checkpoint_args and
load_args_from_checkpoint, core_r0.6.0 … main), with those that say its layout (relayout/metas.py).
GELU by tanh is what Megatron-LM computes where it fuses bias and GELU, its default; see
architecture.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import Index, TensorEntry
from parammap.errors import RefusedError
from parammap.families import CORE, FAMILIES, WORD_EMBEDDING, Architecture
from parammap.families.family import ROTARY, Family
from parammap.formats.pickles import Global, Opaque
from parammap.frameworks.architecture import architecture_for
from parammap.frameworks.megatron import import_optimizer, registration
from parammap.frameworks.megatron.architecture import LLAMA3_SCALING, computed
from parammap.frameworks.megatron.architecture import of as describe
from parammap.frameworks.megatron.reshard import resharded
from parammap.frameworks.megatron.specification import LOCAL, TRANSFORMER_ENGINE, Specification
from parammap.frameworks.megatron.structure import megatron_naming
from parammap.frameworks.megatron.training_state import training_states
from parammap.plan.source_tensors import SourceTensors
from parammap.tensors.arrangement import VOCAB
from parammap.tensors.layout import Layout, Place, TargetLayout
from parammap.tensors.logical import MAIN_PARAM, Stored, TensorSpec
from parammap.tensors.names import shorten_names

_Value = TypeVar("_Value")

NAME = "Megatron-LM"
#: what Megatron-LM's generate_state_dict() stores (core_r0.6.0 … main)
CHECKPOINT_VERSION = 3.0
#: Megatron-LM's default of --make-vocab-size-divisible-by
DIVISIBLE_BY = 128
#: the frameworks whose checkpoints are Megatron's already
NATIVE = ("megatron", "megatron-dist", "mindspore")
_RANK = (0, 0, 0)
#: by whether the MLP is gated, and activation: whether bias and activation are fused
_FUSED = {
    (False, "gelu_new"): True,
    (False, "gelu"): False,
    (False, None): None,
    (True, "silu"): False,
}
#: other names of GELU by tanh (transformers, activations.py)
_ALIASES = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}


def import_model(source: Checkpoint, options: Any) -> Checkpoint:
    """The source as Megatron's, its vocabulary padded by Megatron-LM's rule: with its iteration,
    the optimizer's states and a sidecar where it has an optimizer, else a release, of iteration 0.
    Its layers are of `options.transformer_impl`.

    Raises RefusedError for a model that Megatron-LM cannot compute, for one of which nobody
    recorded how it computes, and for an optimizer that Megatron-LM's cannot be."""
    architecture = architecture_for(source, computed(), NAME)
    states = SourceTensors(source)
    _check(source, architecture, states.names())
    stepped = source.with_optimizer
    args = {
        **_args(source, architecture, states),
        "transformer_impl": options.transformer_impl or TRANSFORMER_ENGINE,
        **(import_optimizer.args(source) if stepped else {}),
    }
    specification = Specification.of(args)
    tensors = list(_tensors(architecture.family, states, args, specification))
    specs = [tensor.spec for tensor in tensors]
    iteration = source.iteration if stepped else 0
    if stepped:
        import_optimizer.check(states)
    metadata = {
        _RANK: {
            "args": Opaque(Global("argparse", "Namespace"), (), new=True, state=args),
            "checkpoint_version": CHECKPOINT_VERSION,
            "iteration": iteration,
            **(import_optimizer.meta(source) if stepped else {}),
        }
    }
    empty = Checkpoint(
        "megatron",
        source.folder,
        iteration,
        Layout(),
        Index([], Layout()),
        stepped,
        source.num_layers,
        rank_folders={_RANK: source.folder},
        rank_metadata=metadata,
        training_states=training_states(metadata),
        structures={
            _RANK: [
                {spec.name: spec for spec in specs}
                | specification.extra_states(spec.name for spec in specs)
            ]
        },
        dropped=source.dropped,
        describe=describe,
        sidecar=import_optimizer.sidecar(source, args, specs) if stepped else None,
        notes=[*source.notes, *_notes(architecture, args, source)],
    )
    naming = megatron_naming(empty, empty.structures)
    found = [
        TensorEntry(
            tensor.spec.name,
            Place(),
            state,
            Stored(states.tensor(state, tensor.first).dtype, tensor.spec.shape, ()),
        )
        for state in (import_optimizer.STATES if stepped else (MAIN_PARAM,))
        for tensor in tensors
    ]
    whole = replace(empty, index=Index([naming.hold(one) for one in found], Layout()))
    return resharded(whole, TargetLayout(layout=Layout())) if stepped else whole


# ---------------------------------------------------------------------------------------------------------
# its tensors


@dataclass(frozen=True, slots=True)
class _ModelTensor:
    """A tensor of the state dict, and the first of the logical tensors that make it up."""

    spec: TensorSpec
    first: str


def _tensors(
    family: str, states: SourceTensors, args: dict[str, Any], specification: Specification
) -> Iterator[_ModelTensor]:
    """The tensors of the state dict, in megatron-core's names, shapes and order, in the dtype that
    the model computes in."""
    used: set[str] = set()
    recorded = states.source.training_state.compute_dtype
    for canonical, kind, name in _table(family, states.source.num_layers, specification):
        _, atoms = states.parts(canonical, kind)
        if there := [atom for atom in atoms if (MAIN_PARAM, atom) in states.tensors]:
            if missing := sorted(set(atoms) - set(there)):
                raise RefusedError(
                    f"{states.source.folder}: lacks {shorten_names(missing)}, a part of {name}"
                )
            used |= set(atoms)
            tensors = [states.tensor(MAIN_PARAM, atom) for atom in atoms]
            rows = (
                args["padded_vocab_size"]
                if kind == VOCAB
                else sum(tensor.rows for tensor in tensors)
            )
            spec = TensorSpec(
                name,
                import_optimizer.model_dtype(states, atoms[0], recorded),
                (rows, *tensors[0].shape[1:]),
            )
            yield _ModelTensor(spec, atoms[0])
    if unplaced := sorted(states.names() - used):
        raise RefusedError(
            f"{states.source.folder}: has {len(unplaced)} tensors that {NAME}'s model has no place "
            f"for: {shorten_names(unplaced)}; the two models are of different architectures"
        )


def _table(
    family: str, num_layers: int, specification: Specification
) -> Iterator[tuple[str, str, str]]:
    """(canonical name, arrangement, megatron-core's name) of all that a dense model may have, layer
    by layer, in the order of named_parameters(), by which buckets are filled."""
    table = {}
    for row in FAMILIES[family].tables[CORE].values():
        for i in range(num_layers) if "{i}" in row.canonical else (None,):
            name = specification.name_of(row.names).format(i=i)
            table[name] = row.canonical.format(i=i), row.arrangement
    yield from ((*table[name], name) for name in registration.in_order(table))


# ----------------------------------------------------------------------------------------------------
# what it computes


def _check(source: Checkpoint, model: Architecture, names: set[str]) -> None:
    """Refuse what Megatron-LM cannot compute, and what nobody recorded."""
    needed = ("heads", "positions", *(["rope_theta"] * (_family(model).positions == ROTARY)))
    unknown = [field for field in needed if getattr(model, field) is None]
    if unknown:
        raise RefusedError(
            f"{source.folder}: does not record its {', '.join(unknown)}, which {NAME} must be "
            "told; name a checkpoint with its configuration"
        )
    biased = {
        name: f"layers.0.{name}.bias" in names for name in ("attention.out", _fc1(model), "mlp.fc2")
    }
    layers = {"q": "layers.0.attention.q.bias" in names, **biased}
    linear = set(biased.values())
    reasons = {
        f"its activation is {model.activation}": (_family(model).gated, _activation(model))
        not in _FUSED,
        f"has biases of {', '.join(name for name, has in layers.items() if has)} alone": len(linear)
        > 1
        or (linear == {True} and not layers["q"]),
        "its biases and GELU cannot be fused, as it has none": not _family(model).gated
        and linear == {False},
        f"stretches its rotary positions by {model.rope_scaling}": _scaling(model) is None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise RefusedError(
                f"{source.folder}: {reason}, which {NAME}'s model cannot compute; the two models "
                "are of different architectures"
            )


def _fc1(model: Architecture) -> str:
    return "mlp.gate" if _family(model).gated else "mlp.fc1"


def _family(model: Architecture) -> Family:
    return FAMILIES[model.family]


def _activation(model: Architecture) -> str | None:
    return model.activation and _ALIASES.get(model.activation, model.activation)


def _scaling(model: Architecture) -> dict[str, Any] | None:
    """Megatron-LM's arguments for a stretching of rotary positions by transformers' names; None if
    it has none."""
    given = dict(model.rope_scaling or {})
    factor, kind = given.pop("factor", 1.0), given.pop("rope_type", given.pop("type", "default"))
    if kind == "default":
        return {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None}
    if kind == "linear" and factor == int(factor):
        return {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": int(factor)}
    if {"rope_type": kind, **given} == LLAMA3_SCALING:
        return {
            "use_rope_scaling": True,
            "rope_scaling_factor": factor,
            "rotary_seq_len_interpolation_factor": None,
        }
    return None


def _args(source: Checkpoint, model: Architecture, states: SourceTensors) -> dict[str, Any]:
    """What Megatron-LM would have saved of such a run at one rank."""
    names, family = states.names(), _family(model)
    is_rotary = family.positions == ROTARY
    words, dtype = (
        states.tensor(MAIN_PARAM, WORD_EMBEDDING),
        import_optimizer.model_dtype(states, WORD_EMBEDDING, source.training_state.compute_dtype),
    )
    heads = _known(model.heads)
    groups, head_size = model.groups or heads, model.head_size or words.cols // heads
    return {
        "num_layers": model.layers,
        "encoder_num_layers": model.layers,
        "hidden_size": words.cols,
        "ffn_hidden_size": states.tensor(MAIN_PARAM, "layers.0.mlp.fc2.weight").cols,
        "num_attention_heads": heads,
        "kv_channels": head_size,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "seq_length": model.positions,
        "encoder_seq_length": model.positions,
        "max_position_embeddings": model.positions,
        "position_embedding_type": "rope" if is_rotary else "learned_absolute",
        "add_position_embedding": not is_rotary,
        "use_rotary_position_embeddings": is_rotary,
        "rotary_base": _plain(_known(model.rope_theta)) if is_rotary else 10000,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rope_scaling_factor": 8.0,
        **_known(_scaling(model)),
        "normalization": family.norm,
        "norm_epsilon": model.eps,
        "apply_layernorm_1p": False,
        "apply_residual_connection_post_layernorm": False,
        "apply_query_key_layer_scaling": False,
        "qk_layernorm": "layers.0.attention.q_norm.weight" in names,
        "add_bias_linear": "layers.0.mlp.fc2.bias" in names,
        "add_qkv_bias": "layers.0.attention.q.bias" in names,
        "swiglu": family.gated,
        "squared_relu": False,
        "openai_gelu": False,
        "onnx_safe": None,
        "bias_gelu_fusion": _FUSED[family.gated, _activation(model)],
        "bias_swiglu_fusion": family.gated,
        "untie_embeddings_and_output_weights": "output.weight" in names,
        "num_experts": None,
        "vocab_size": words.rows,
        "padded_vocab_size": -(-words.rows // DIVISIBLE_BY) * DIVISIBLE_BY,
        "make_vocab_size_divisible_by": DIVISIBLE_BY,
        "tokenizer_type": None if is_rotary else "GPT2BPETokenizer",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "transformer_pipeline_model_parallel_size": 1,
        "num_layers_per_virtual_pipeline_stage": None,
        "num_virtual_stages_per_pipeline_rank": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "pipeline_model_parallel_layout": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "world_size": 1,
        "use_tp_pp_dp_mapping": False,
        "params_dtype": Global("torch", dtype),
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "use_mcore_models": True,
        "use_legacy_models": False,
        "use_dist_ckpt": False,
        "ckpt_format": "torch",
        "data_parallel_random_init": False,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def _known(value: _Value | None) -> _Value:
    """What `_check` has seen to be there."""
    assert value is not None
    return value


def _plain(number: float) -> float:
    """--rotary-base is an integer in all releases."""
    return int(number) if number == int(number) else number


def _notes(model: Architecture, args: dict[str, Any], source: Checkpoint) -> Iterator[str]:
    flags = [f"--norm-epsilon {model.eps}"] if model.eps is not None else []
    flags += [f"--rotary-base {args['rotary_base']}"] if _family(model).positions == ROTARY else []
    flags += ["--no-bias-gelu-fusion"] if _activation(model) == "gelu" else []
    flags += ["--qk-layernorm"] if args["qk_layernorm"] else []
    flags += ["--use-rope-scaling", f"--rope-scaling-factor {args['rope_scaling_factor']}"] * args[
        "use_rope_scaling"
    ]
    if stretch := args["rotary_seq_len_interpolation_factor"]:
        flags.append(f"--rotary-seq-len-interpolation-factor {stretch}")
    flags += import_optimizer.flags(args) if source.with_optimizer else []
    flags += ["--use-checkpoint-args", f"--transformer-impl {args['transformer_impl']}"]
    flags += ["--no-persist-layer-norm"] * (args["transformer_impl"] == LOCAL)
    yield f"run Megatron-LM with {' '.join(flags)}, which takes all else from the checkpoint"
    if unrecorded := [field for field in ("activation", "eps") if getattr(model, field) is None]:
        yield f"nobody recorded its {' and '.join(unrecorded)}, which Megatron-LM takes from its command line alone"
    if (rows := args["padded_vocab_size"]) > args["vocab_size"]:
        yield f"vocabulary padded to {rows} rows, from {args['vocab_size']}: the new ones repeat the last one"
    if source.with_optimizer:
        yield from import_optimizer.notes(source, args["params_dtype"].name)
    elif source.iteration:
        yield f"a release, of weights only: the iteration {source.iteration} stays behind"
