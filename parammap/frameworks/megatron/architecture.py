"""What a Megatron-LM model computes, by the arguments saved with it, by the sidecar's layout file,
and by its tensors.

GELU is exact where nothing says otherwise. It is computed by tanh where bias and GELU are fused
(core/fusions/ fused_bias_gelu.py; --no-bias-gelu-fusion turns that off, and so does
--disable-bias-linear) and by Transformer Engine's own GELU; legacy models also know --openai-gelu
(tanh) and --onnx-safe (erf), which megatron-core leaves unread.

Sources: Megatron-LM 23.06 … core_v0.16.0 (training/arguments.py, core_transformer_config_from_args;
legacy/model/ transformer.py, ParallelMLP; core/transformer/mlp.py and transformer_config.py;
core/models/common/embeddings/ rotary_pos_embedding.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.families import CORE, FAMILIES, HEAD, WORD_EMBEDDING, Architecture, with_dialect
from parammap.families.family import LAYER_NORM, LEARNED, RMS_NORM, ROTARY
from parammap.frameworks.megatron.facts import Facts
from parammap.plan.source_tensors import SourceTensors
from parammap.tensors.logical import MAIN_PARAM

POSITIONS = "embedding.position.weight"
#: what models compute that other frameworks have as well: like GPT-2, like LLaMA
_GPT2, _LLAMA = (LAYER_NORM, LEARNED, False), (RMS_NORM, ROTARY, True)
#: options that make a model compute otherwise than GPT-2 and LLaMA do, where they are set
_UNLIKE = (
    "num_experts",
    "squared_relu",
    "quick_geglu",
    "apply_layernorm_1p",
    "layernorm_zero_centered_gamma",
    "apply_residual_connection_post_layernorm",
    "multi_latent_attention",
    "attention_output_gate",
    "qk_l2_norm",
    "use_lf_gate",
    "window_size",
    "no_rope_freq",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "mtp_num_layers",
    "experimental_attention_variant",
    "linear_attention_freq",
    "hybrid_override_pattern",
    "heterogeneous_layers_config_path",
    "softmax_scale",
    "use_mup",
    "spec",
)
#: options by which GELU is computed with tanh, in megatron-core
_TANH = ("bias_gelu_fusion", "use_te_activation_func", "use_transformer_engine_op_fuser")
#: --use-rope-scaling (RotaryEmbedding._apply_scaling), by transformers' names; the factor is an
#: argument from 0.11 on
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_DEFAULT_FACTOR = 8.0
#: --rotary-base, which releases before core 0.7 do not have
_DEFAULT_BASE = 10000


def of(source: Checkpoint) -> Architecture:
    """The architecture of a checkpoint of Megatron-LM, of torch_dist's format, or of
    MindSpeed-Core-MS.

    Without arguments (bare megatron-core) and without a sidecar the tensors tell the family and the
    sizes; heads, eps, activation and rotary base are then None. Raises RefusedError for a model
    that is neither like GPT-2 nor like LLaMA, with the reason."""
    facts = Facts.of_checkpoint(source)
    said = {
        **facts.args,
        **{name: value for name, value in facts.model.items() if value is not None},
    }
    states = SourceTensors(source)
    names, kind = states.names(), _positions(said)
    for reason in _reasons(said, kind):
        raise RefusedError(
            f"{source.folder}: {reason}, as no GPT-2 and no LLaMA does; only Megatron's own "
            "formats can take it"
        )
    family = _family(source, names, kind)
    is_rotary = FAMILIES[family].positions == ROTARY
    words, fc2 = (
        states.tensor(MAIN_PARAM, WORD_EMBEDDING),
        states.tensor(MAIN_PARAM, "layers.0.mlp.fc2.weight"),
    )
    sizes = facts.sizes()
    query = states.tensors.get((MAIN_PARAM, "layers.0.attention.q.weight"))
    table = states.tensors.get((MAIN_PARAM, POSITIONS))
    return Architecture(
        family=family,
        layers=source.num_layers,
        hidden=words.cols,
        heads=sizes.heads,
        groups=sizes.groups,
        ffn=fc2.cols,
        vocab=words.rows,
        positions=table.rows if table else said.get("max_position_embeddings"),
        activation=_activation(facts.args, family),
        eps=said.get("norm_epsilon", said.get("layernorm_epsilon")),
        rope_theta=_rope_theta(facts, said) if is_rotary else None,
        rope_scaling=_rope_scaling(said) if is_rotary else None,
        tied=_tied(source, facts, names),
        bias="layers.0.mlp.fc2.bias" in names,
        head_size=query.rows // sizes.heads if query and sizes.heads else said.get("kv_channels"),
    )


def computed() -> tuple[str, ...]:
    """The families whose models Megatron-LM computes as other frameworks do."""
    return tuple(name for name in with_dialect(CORE) if FAMILIES[name].computes in (_GPT2, _LLAMA))


def _reasons(said: dict[str, Any], positions: str | None) -> Iterator[str]:
    """What of the options another framework's model does not compute."""
    yield from (f"was trained with {name} {said[name]}" for name in _UNLIKE if said.get(name))
    if said.get("softmax_type") not in (None, "vanilla"):
        yield f"was trained with softmax_type {said['softmax_type']}"
    if positions not in (None, "learned_absolute", "rope"):
        yield f"its positions are {positions}"
    if positions == "rope" and said.get("rotary_interleaved"):
        yield "rotates neighbouring elements (rotary_interleaved)"
    if positions == "rope" and said.get("rotary_percent") not in (None, 1):
        yield f"rotates only a part of each head (rotary_percent {said['rotary_percent']})"


def _positions(said: dict[str, Any]) -> str | None:
    """--use-rotary-position-embeddings is the older name of --position-embedding-type rope."""
    return (
        "rope"
        if said.get("use_rotary_position_embeddings")
        else said.get("position_embedding_type")
    )


def _family(source: Checkpoint, names: set[str], positions: str | None) -> str:
    """By which tensors are there: norms with biases, gates, a table of positions."""
    has = {
        "norms with biases": "final_norm.bias" in names,
        "a gated MLP": "layers.0.mlp.gate.weight" in names,
        "a table of positions": POSITIONS in names,
        "rotary positions": positions == "rope",
    }
    rotary = has["rotary positions"] or positions is None and not has["a table of positions"]
    tells = (has["norms with biases"], has["a gated MLP"], has["a table of positions"], rotary)
    known = {(True, False, True, False): _GPT2, (False, True, False, True): _LLAMA}
    if tells not in known:
        there = [f"{'' if value else 'not '}{what}" for what, value in has.items()]
        raise RefusedError(
            f"{source.folder}: is neither like GPT-2 (norms with biases, learned positions, no "
            f"gates) nor like LLaMA (RMS norms, rotary positions, gates): it has {', '.join(there)}"
        )
    return next(name for name in computed() if FAMILIES[name].computes == known[tells])


def _activation(args: dict[str, Any], family: str) -> str | None:
    """None where nobody recorded it: a model that was adopted says so by None."""
    if not args:
        return None
    if FAMILIES[family].gated:
        return "silu" if args.get("swiglu") else None
    if args.get("use_legacy_models", not args.get("use_mcore_models")):
        if args.get("openai_gelu"):
            return "gelu_new"
        if args.get("onnx_safe"):
            return "gelu"
    if args.get("bias_gelu_fusion", False) is None:
        return None
    return "gelu_new" if any(args.get(name) for name in _TANH) else "gelu"


def _rope_theta(facts: Facts, said: dict[str, Any]) -> float | None:
    base: Any = said.get("rotary_base", _DEFAULT_BASE if facts.args else None)
    return None if base is None else float(base)


def _rope_scaling(said: dict[str, Any]) -> dict[str, Any] | None:
    if said.get("use_rope_scaling"):
        return {
            **LLAMA3_SCALING,
            "factor": float(said.get("rope_scaling_factor") or _DEFAULT_FACTOR),
        }
    stretch = said.get("rotary_seq_len_interpolation_factor")
    return {"rope_type": "linear", "factor": float(stretch)} if stretch not in (None, 1) else None


def _tied(source: Checkpoint, facts: Facts, names: set[str]) -> bool | None:
    """Where nobody recorded it, a head in the only stage is no copy of the word embedding, and none
    is it itself."""
    recorded = facts.tied()
    return HEAD not in names if recorded is None and source.layout.pp == 1 else recorded
