"""What is known of a checkpoint's model, and its parameters by kind, as plain data."""

from __future__ import annotations

from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import is_padding
from parammap.errors import RefusedError
from parammap.families import HEAD, WORD_EMBEDDING, Architecture
from parammap.frameworks.architecture import architecture_of
from parammap.frameworks.framework import Recorded
from parammap.inspection.kinds import KINDS, kind_of
from parammap.inspection.reading import asked
from parammap.tensors.logical import MAIN_PARAM, LogicalTensor

MODEL_FACTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "padded_vocab_size",
    "max_position_embeddings",
    "position_embedding_type",
    "normalization",
    "swiglu",
    "add_bias_linear",
    "num_experts",
    "untie_embeddings_and_output_weights",
)


#: the same facts by the names of an architecture, for checkpoints without Megatron-LM's arguments
_ARCHITECTURE_FACTS = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "heads": "num_attention_heads",
    "head_size": "kv_channels",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
    "activation": "activation",
}


def model(recorded: Recorded, whole: Checkpoint) -> dict[str, Any]:
    """What the run recorded of the model; layers, width and vocabulary by the tensors themselves
    where it did not."""
    computed = architecture(whole)
    known = _of_architecture(computed) if computed else _recorded_model(recorded, whole)
    return {
        name: value for name, value in known.items() if isinstance(value, (bool, int, float, str))
    }


def _recorded_model(recorded: Recorded, whole: Checkpoint) -> dict[str, Any]:
    embedding = next((t for t in whole.index.tensors(MAIN_PARAM) if t.name == WORD_EMBEDDING), None)
    by_tensors: dict[str, int | None] = {"num_layers": whole.num_layers}
    if embedding:
        padding = sum(
            t.rows
            for t in whole.index.tensors(MAIN_PARAM)
            if is_padding(t) and t.name.startswith(WORD_EMBEDDING)
        )
        by_tensors |= {"padded_vocab_size": embedding.rows + padding, "hidden_size": embedding.cols}
    if recorded.sizes.heads:
        by_tensors["num_query_groups"] = recorded.sizes.groups
    return {**{name: recorded.settings.get(name) for name in MODEL_FACTS}, **by_tensors}


def architecture(whole: Checkpoint) -> Architecture | None:
    """What the model of a framework that keeps no arguments of Megatron-LM's computes; None if that
    is not known."""
    try:
        return None if asked(whole).keeps_args else architecture_of(whole)
    except RefusedError:
        return None


def _of_architecture(known: Architecture) -> dict[str, Any]:
    groups = known.groups if known.groups != known.heads else None
    return {
        **{name: getattr(known, own) for own, name in _ARCHITECTURE_FACTS.items()},
        "num_query_groups": groups,
        "untie_embeddings_and_output_weights": None if known.tied is None else not known.tied,
    }


def parameters(recorded: Recorded, is_tied: bool | None, whole: Checkpoint) -> dict[str, Any]:
    """Logical parameters, each counted once however many ranks keep a copy. `total` is all;
    `vocab_padding` what of it is rows past the vocabulary, None where nobody recorded that;
    `tied_copy` the elements of an output layer that repeats the embedding, which are not in `total`
    (None where nobody recorded whether it does: then they are)."""
    weights = whole.index.tensors(MAIN_PARAM)
    by_kind = dict.fromkeys(KINDS, 0)
    for tensor in weights:
        by_kind[kind_of(tensor.name)] += numel(tensor)
    total = sum(map(numel, weights))
    knows_vocab = recorded.sizes.vocab or architecture(whole)
    padding = (
        sum(
            numel(t) for t in weights if is_padding(t) and t.name.startswith((WORD_EMBEDDING, HEAD))
        )
        if knows_vocab
        else None
    )
    copied = {
        part.tensor
        for held in whole.index.held
        if held.is_tied_head
        for part in held.parts
        if part.tensor and part.tensor.state == MAIN_PARAM
    }
    is_told = copied or is_tied is not None or HEAD not in {tensor.name for tensor in weights}
    return {
        "tensors": len(weights),
        "total": total,
        "by_kind": {kind: n for kind, n in by_kind.items() if n},
        "tied_copy": sum(map(numel, copied)) if is_told else None,
        "vocab_padding": padding,
        "without_padding": None if padding is None else total - padding,
    }


def numel(tensor: LogicalTensor) -> int:
    return tensor.rows * tensor.cols
