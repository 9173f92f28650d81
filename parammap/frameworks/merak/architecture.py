"""What a Merak checkpoint says of its model: a config.json beside it, and the arguments saved with
it.

The tools save neither (or the arguments of a Megatron-DeepSpeed run), the runtime its own
arguments, which have no more of the model than its layers. Names: transformers' GPT2Config;
Megatron-LM's arguments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.families import GPT2, WORD_EMBEDDING, Architecture
from parammap.formats import json_document
from parammap.frameworks.megatron.facts import Facts, args_of
from parammap.tensors.logical import MAIN_PARAM

CONFIG = "config.json"
#: our fields: their names in config.json or among the arguments, the first one that is there
_NAMES = {
    "layers": ("n_layer", "num_hidden_layers", "num_layers"),
    "hidden": ("n_embd", "hidden_size"),
    "heads": ("n_head", "num_attention_heads", "num_heads"),
    "ffn": ("n_inner", "ffn_hidden_size"),
    "vocab": ("orig_vocab_size", "vocab_size", "padded_vocab_size"),
    "positions": ("n_positions", "max_position_embeddings"),
    "activation": ("activation_function",),
    "eps": ("layer_norm_epsilon", "layernorm_epsilon"),
    "tied": ("tie_word_embeddings",),
}


def find_config(folder: Path, given: Path | None = None) -> dict[str, Any]:
    """The config.json given (or in the folder given), else the one in the checkpoint's folder, else
    its parent's; {} if there is none. Raises RefusedError for one that is missing, damaged, or of
    another model than GPT-2."""
    if given is not None:
        return read_config(given / CONFIG if given.is_dir() else given)
    path = next(
        (path for path in (folder / CONFIG, folder.parent / CONFIG) if path.is_file()), None
    )
    return read_config(path) if path else {}


def read_config(path: Path) -> dict[str, Any]:
    """A GPT-2's config.json."""
    config: dict[str, Any] = json_document.read(
        path, json_document.check_of("config"), "name a config.json of GPT-2"
    )
    if config.get("model_type", GPT2) != GPT2:
        raise RefusedError(
            f"{path}: is no configuration of GPT-2, the one model that is read of Merak"
        )
    return config


def said(config: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    """What is recorded, by our names; the configuration's word before the arguments'. Megatron-LM's
    `vocab_size` is what its reader takes it for."""
    sources = config, {**args, "vocab_size": Facts(None, args).sizes().vocab}
    found = {field: _first(names, *sources) for field, names in _NAMES.items()}
    return {field: value for field, value in found.items() if value is not None}


def _first(names: tuple[str, ...], *sources: dict[str, Any]) -> Any:
    return next(
        (source[name] for source in sources for name in names if source.get(name) is not None), None
    )


def of(checkpoint: Checkpoint) -> Architecture:
    """The model that a checkpoint of Merak's is of; heads, activation and eps are None where nobody
    recorded them."""
    meta = checkpoint.common_metadata
    config = meta["config"]
    return from_tensors(checkpoint, said(config, args_of(meta)), config)


def from_tensors(
    checkpoint: Checkpoint, known: dict[str, Any], config: dict[str, Any]
) -> Architecture:
    """A GPT-2 whose sizes are those of its tensors; `known` says what tensors do not."""
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.index.tensors(MAIN_PARAM)}
    has_head = "output.weight" in shapes
    return Architecture(
        family=GPT2,
        layers=checkpoint.num_layers,
        hidden=shapes[WORD_EMBEDDING][1],
        heads=known.get("heads"),
        groups=known.get("heads"),
        ffn=shapes["layers.0.mlp.fc1.weight"][0],
        vocab=shapes[WORD_EMBEDDING][0],
        positions=shapes["embedding.position.weight"][0],
        activation=known.get("activation"),
        eps=known.get("eps"),
        tied=not has_head,
        bias=True,
        config=config,
    )


def completed(architecture: Architecture, path: Path | None) -> Architecture:
    """The architecture with what a config.json says that nobody recorded. Raises RefusedError where
    it contradicts."""
    if path is None:
        return architecture
    config = read_config(path)
    known = said(config, {})
    for field in ("layers", "hidden", "heads", "ffn", "positions", "activation"):
        there = getattr(architecture, field)
        if None not in (there, known.get(field)) and there != known[field]:
            raise RefusedError(
                f"{path}: says {field} {known[field]}, and the model has {there}; it is of another "
                f"model"
            )
    return replace(
        architecture,
        heads=architecture.heads or known.get("heads"),
        groups=architecture.groups or known.get("heads"),
        activation=architecture.activation or known.get("activation"),
        eps=architecture.eps or known.get("eps"),
        config=config,
    )
