"""What a model of Megatron-DeepSpeed computes, by the arguments saved with it and by its tensors.

GELU is exact, but computed by tanh where it is fused with the bias and where --openai-gelu asks for
it. There is no position table for rotary positions and for ALiBi; BLOOM's models have ALiBi and a
norm on the embedding.

Source: bigscience-workshop/Megatron-DeepSpeed 8387ae1 (megatron/arguments.py;
megatron/model/transformer.py, ParallelMLP; megatron/model/fused_bias_gelu.py; megatron/enums.py,
PositionEmbeddingType)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.families import BLOOM, GPT2, WORD_EMBEDDING, Architecture
from parammap.formats.pickles import Opaque
from parammap.frameworks.megatron.facts import args_of
from parammap.plan.source_tensors import SourceTensors
from parammap.tensors.logical import MAIN_PARAM

POSITIONS, EMBEDDING_NORM = "embedding.position.weight", "embedding.norm.weight"
#: PositionEmbeddingType, by its values
_POSITIONS = {1: "rotary", 2: "absolute", 3: "alibi"}
_UNLIKE = ("glu_activation", "apply_residual_connection_post_layernorm")


def of(source: Checkpoint) -> Architecture:
    """The architecture of a GPT or BLOOM. `activation` and `eps` are None without arguments.

    Raises RefusedError for a model of which nobody knows what it computes, and for one that
    computes what neither does."""
    args = args_of(source.common_metadata)
    states = (
        SourceTensors(source)
        if (MAIN_PARAM, WORD_EMBEDDING) in {(t.state, t.name) for t in source.index.shards}
        else None
    )
    if states is None or "final_norm.weight" not in states.names():
        raise RefusedError(
            f"{source.folder}: holds a model that no table of names knows; it can be written as a "
            "universal checkpoint only"
        )
    names, positions = states.names(), _positions(args)
    for reason in _reasons(args, names, positions):
        raise RefusedError(
            f"{source.folder}: {reason}, as no GPT-2 and no BLOOM does; it can be written as a "
            "universal checkpoint only"
        )
    words, query = (
        states.tensor(MAIN_PARAM, WORD_EMBEDDING),
        states.tensors.get((MAIN_PARAM, "layers.0.attention.q.weight")),
    )
    table, heads = states.tensors.get((MAIN_PARAM, POSITIONS)), args.get("num_attention_heads")
    return Architecture(
        family=GPT2 if table else BLOOM,
        layers=source.num_layers,
        hidden=words.cols,
        heads=heads,
        groups=heads,
        ffn=states.tensor(MAIN_PARAM, "layers.0.mlp.fc2.weight").cols,
        vocab=words.rows,
        positions=table.rows if table else args.get("max_position_embeddings"),
        activation=_activation(args),
        eps=args.get("layernorm_epsilon"),
        tied=True,
        bias="layers.0.mlp.fc2.bias" in names,
        head_size=query.rows // heads if query and heads else None,
    )


def _reasons(args: dict[str, Any], names: set[str], positions: str | None) -> Iterator[str]:
    """What of the model is like neither GPT-2's nor BLOOM's."""
    yield from (f"was trained with {name} {args[name]}" for name in _UNLIKE if args.get(name))
    if "layers.0.mlp.gate.weight" in names:
        yield "has a gated MLP"
    if "final_norm.bias" not in names:
        yield "has norms without biases"
    if positions == "rotary":
        yield "its positions are rotary"
    if POSITIONS in names and EMBEDDING_NORM in names:
        yield "has a table of positions and a norm on its embedding"
    if POSITIONS not in names and EMBEDDING_NORM not in names:
        yield "has neither a table of positions nor a norm on its embedding"


def _positions(args: dict[str, Any]) -> str | None:
    kind = args.get("position_embedding_type")
    return _POSITIONS.get(kind.args[0]) if isinstance(kind, Opaque) and kind.args else kind


def _activation(args: dict[str, Any]) -> str | None:
    if args.get("openai_gelu") or args.get("bias_gelu_fusion"):
        return "gelu_new"
    return "gelu" if "bias_gelu_fusion" in args else None
