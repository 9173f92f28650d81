"""Weights as Alpa's llm_serving reads them: a folder with one numpy file per parameter, under metaseq's names for OPT.

File names have no extension; matrices are [out, in] as everywhere, q, k and v are apart, and the loader transposes and
fuses them. Its model is OPT only as of version 3: norms before attention and MLP, one more at the end, biases everywhere,
learned positions of which the first two rows are for padding, ReLU, and the word embedding as its head.

Source: alpa b8078a9, examples/llm_serving/model/opt_model.py (OPTConfig, get_config, load_params_np), scripts/step_3.
BLOOM's loader there (bloom_model.py) reads HF's names (`h.0.self_attention.query_key_value.weight` …, rows per head q, k,
v, as Megatron-DeepSpeed has them) in the same way; no family here knows BLOOM yet, so its tensors are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...checkpoint import Checkpoint
from ...containers import npy
from ...errors import RefusedError
from ...families import HEAD, WORD_EMBEDDING
from ...fusion import PADDING
from ...naming import brief
from ...plan import Output, Wanted, WantedFile
from ...tensors import WEIGHT, Box, Tensor, TensorSpec
from ..megatron.facts import args_of
from ..metaseq import reader as metaseq

POSITIONS = "embedding.position.weight"
#: rows of OPT's table of positions before the first token's (metaseq, learned_positional_embedding.py: padding_idx + 1)
PADDING_POSITIONS = 2

_LAYER = "decoder.layers.{i}."
#: file name: canonical name; {w} stands for weight and bias
_FILES = {
    "decoder.embed_tokens.weight": WORD_EMBEDDING,
    "decoder.embed_positions.weight": POSITIONS,
    "decoder.layer_norm.{w}": "final_norm.{w}",
    _LAYER + "self_attn.q_proj.{w}": "layers.{i}.attention.q.{w}",
    _LAYER + "self_attn.k_proj.{w}": "layers.{i}.attention.k.{w}",
    _LAYER + "self_attn.v_proj.{w}": "layers.{i}.attention.v.{w}",
    _LAYER + "self_attn.out_proj.{w}": "layers.{i}.attention.out.{w}",
    _LAYER + "self_attn_layer_norm.{w}": "layers.{i}.input_norm.{w}",
    _LAYER + "fc1.{w}": "layers.{i}.mlp.fc1.{w}",
    _LAYER + "fc2.{w}": "layers.{i}.mlp.fc2.{w}",
    _LAYER + "final_layer_norm.{w}": "layers.{i}.post_attention_norm.{w}",
}
#: options of metaseq (f7ffa5f, models/transformer_lm.py) and of Megatron-LM (core_r0.6.0 … 0.16, arguments.py) that change
#: what a model computes, as OPT has them
_OPT_OPTIONS = {"no_scale_embedding": True, "alibi": False, "apply_layernorm_1p": False,
                "apply_residual_connection_post_layernorm": False}
#: Megatron-LM's options for an MLP without GELU
_MEGATRON_ACTIVATIONS = ("swiglu", "squared_relu", "quick_geglu")
#: what a model may have without computing with it
BUFFERS = frozenset({"version"})
#: llm_serving's models (get_config) by layers and hidden size; each with this vocabulary
PUBLIC = {(12, 768): "opt-125m", (24, 2048): "opt-1.3b", (32, 2560): "opt-2.7b", (32, 4096): "opt-6.7b",
          (48, 7168): "opt-30b", (64, 9216): "opt-66b", (96, 12288): "opt-175b"}
PUBLIC_VOCAB = 50272


@dataclass(frozen=True, slots=True)
class Options:
    """`cast`, the dtype of the weights; `vocab_size`, the rows of the word embedding (None: the source's, its padding
    included); `activation`, what the user says of a source that does not record it."""

    cast: str = "float16"
    vocab_size: int | None = None
    activation: str | None = None


class States:
    """The source's logical tensors by role and name, and the blocks that make up a parameter of the output."""

    def __init__(self, source: Checkpoint, vocab_size: int | None) -> None:
        self.source = source
        self.tensors = {(tensor.role, tensor.name): tensor for tensor in source.index.boxes}
        self.vocab_size = vocab_size or self.rows(WORD_EMBEDDING)
        words = self.tensors[WEIGHT, WORD_EMBEDDING].rows
        if self.vocab_size < words:
            raise RefusedError(f"{source.folder}: has a vocabulary of {words}, of which --vocab-size {self.vocab_size} "
                               "would cut off a part; leave it out, or give at least as many")

    def names(self) -> set[str]:
        """The canonical names of the weights, padding of the vocabulary and buffers left out."""
        return {name for role, name in self.tensors
                if role == WEIGHT and not name.endswith(f".{PADDING}") and name not in BUFFERS}

    def tensor(self, role: str, name: str) -> Tensor:
        if (role, name) not in self.tensors:
            raise RefusedError(f"{self.source.folder}: holds no {role} of {name}, which Alpa keeps for every parameter")
        return self.tensors[role, name]

    def rows(self, name: str) -> int:
        """The rows of a weight, with those of a vocabulary's padding."""
        padding = self.tensors.get((WEIGHT, f"{name}.{PADDING}"))
        if (WEIGHT, name) not in self.tensors:
            raise RefusedError(f"{self.source.folder}: holds no {name}")
        return self.tensors[WEIGHT, name].rows + (padding.rows if padding else 0)

    def blocks(self, role: str, name: str, positions_before: int = 0) -> tuple[tuple[Tensor | None, Box], ...]:
        """A parameter whole: a vocabulary as long as it shall be, positions behind so many rows of zeros."""
        tensor = self.tensor(role, name)
        whole = ((tensor, Box(0, tensor.rows, 0, tensor.cols)),)
        if name == POSITIONS and positions_before:
            return ((None, Box(0, positions_before, 0, tensor.cols)), *whole)
        added = self.vocab_size - tensor.rows if name in (WORD_EMBEDDING, HEAD) else 0
        if not added:
            return whole
        padding = Tensor(role, f"{name}.{PADDING}", tensor.dtype, (added, *tensor.shape[1:]))
        return (*whole, (padding, Box(0, added, 0, tensor.cols)))


def output(target: Checkpoint, options: Options = Options()) -> Output:
    """Plan the folder. Raises RefusedError for a model of another architecture, and for a dtype that numpy lacks."""
    if target.framework == "alpa":
        raise RefusedError(f"{target.folder}: is Alpa's already; convert what it was made from")
    states, files = States(target, options.vocab_size), dict(_files(target.num_layers))
    check_names(states, set(files.values()), "Alpa's OPT")
    check_opt(states, options.activation, "Alpa's OPT")
    _check_vocabulary(states, options)
    files |= {f"decoder.{name}": name for name in sorted(BUFFERS) if (WEIGHT, name) in states.tensors}
    return Output([_file(path, states, name, options) for path, name in files.items()],
                  [(folder, "") for folder in target.rank_folders.values()], [],
                  {"alpa": {**described(states), "dtype": options.cast}},
                  roles=(WEIGHT,), needless=BUFFERS)


def _files(num_layers: int) -> Iterator[tuple[str, str]]:
    """(file name, canonical name) of each parameter, layer by layer."""
    for i in [None, *range(num_layers)]:
        for path, name in _FILES.items():
            if ("{i}" in path) == (i is not None):
                for w in ("weight", "bias") if "{w}" in path else ("weight",):
                    yield path.format(i=i, w=w), name.format(i=i, w=w)


def _file(path: str, states: States, name: str, options: Options) -> WantedFile:
    blocks = states.blocks(WEIGHT, name, positions_to_add(states))
    shape = (sum(box.rows for _, box in blocks), *states.tensor(WEIGHT, name).shape[1:])
    spec = TensorSpec(path, options.cast, shape)
    return WantedFile(path, tuple(npy.frame(spec)), (Wanted(spec, blocks),))


def positions_to_add(states: States) -> int:
    """The rows that OPT's positions have before those of the source."""
    return 0 if states.source.framework == "metaseq" else PADDING_POSITIONS


def check_names(states: States, expected: set[str], model: str) -> None:
    """Refuse a source whose parameters are not just those of the model."""
    missing, unknown = sorted(expected - states.names()), sorted(states.names() - expected)
    for names, what in ((missing, "lacks {} of"), (unknown, "has {} that have no place in")):
        if names:
            raise RefusedError(f"{states.source.folder}: {what.format(f'{len(names)} tensors')} {model}: {brief(names)}; "
                               "the two models are of different architectures")


def check_opt(states: States, stated: str | None, model: str) -> None:
    """Refuse a source that computes otherwise than OPT does, as far as it says so; `stated` is the activation by the user's
    word."""
    options = options_of(states.source)
    activation = options.get("activation_fn", stated)
    word, query, key = (states.tensor(WEIGHT, name).shape for name in (
        WORD_EMBEDDING, "layers.0.attention.q.weight", "layers.0.attention.k.weight"))
    reasons = {
        f"its embedding has {word[1]} columns and its layers {query[1]}": word[1] != query[1],
        f"its attention has {query[0]} rows of queries and {key[0]} of keys": query[0] != key[0],
        f"its activation is {activation} and not relu": activation not in (None, "relu"),
        "it does not say what its activation is; tell with --activation": activation is None,
        **{f"it was trained with {name} {options.get(name)}": options.get(name, value) != value
           for name, value in _OPT_OPTIONS.items()},
    }
    for reason, applies in reasons.items():
        if applies:
            raise RefusedError(f"{states.source.folder}: cannot be {model}: {reason}")


def options_of(source: Checkpoint) -> dict:
    """What the run's arguments say of how the model computes, by metaseq's names; `activation_fn` is missing if nobody
    knows it. A metaseq checkpoint without arguments is taken for OPT, which has ReLU."""
    meta = next(iter(source.metas.values()), {})
    if source.framework == "metaseq":
        said = {name: metaseq._setting(meta, name) for name in ("activation_fn", *_OPT_OPTIONS)}
        return {"activation_fn": "relu", **{name: value for name, value in said.items() if value is not None}}
    args = args_of(meta)
    known = [name for name in _MEGATRON_ACTIVATIONS if args.get(name)] or ["gelu"]
    return {**args, "activation_fn": known[0]} if args else {}


def _check_vocabulary(states: States, options: Options) -> None:
    sizes = described(states)
    name = PUBLIC.get((sizes["num_hidden_layers"], sizes["hidden_size"]))
    if name and states.vocab_size != PUBLIC_VOCAB and options.vocab_size is None:
        raise RefusedError(f"{states.source.folder}: has {states.vocab_size} rows of vocabulary, and llm_serving's {name} "
                           f"takes {PUBLIC_VOCAB}; --vocab-size {PUBLIC_VOCAB} adds copies of the last row, and "
                           f"--vocab-size {states.vocab_size} is for a configuration of your own")


def described(states: States) -> dict[str, int]:
    """The sizes that the model's configuration must have, by OPTConfig's names."""
    source = states.source
    return {"num_hidden_layers": source.num_layers, "vocab_size": states.vocab_size,
            "vocab_rows_added": max(states.vocab_size - states.rows(WORD_EMBEDDING), 0),
            "hidden_size": states.tensor(WEIGHT, WORD_EMBEDDING).cols,
            "ffn_embed_dim": states.tensor(WEIGHT, "layers.0.mlp.fc1.weight").rows}
