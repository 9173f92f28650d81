"""Weights as Alpa's llm_serving reads them: a folder with one numpy file per parameter, under
metaseq's names for OPT.

File names have no extension; matrices are [out, in] as everywhere, q, k and v are apart, and the
loader transposes and fuses them. Its model is OPT only as of version 3: norms before attention and
MLP, one more at the end, biases everywhere, learned positions of which the first two rows are for
padding, ReLU, and the word embedding as its head.

Source: alpa b8078a9, examples/llm_serving/model/opt_model.py (OPTConfig, get_config,
load_params_np), scripts/step_3. BLOOM's loader there (bloom_model.py,
load_bloom_params_worker_func) reads HF's names (`h.0.self_attention.query_key_value. weight` …,
rows per head q, k, v) in the same way; its head is the word embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.families import (
    BLOOM,
    FAMILIES,
    GPT2,
    HEAD,
    HF_BLOOM,
    OPT,
    WORD_EMBEDDING,
    Architecture,
    Row,
    tensors_of,
)
from parammap.families.opt import BUFFERS
from parammap.formats import npy
from parammap.frameworks.architecture import architecture_for, architecture_of
from parammap.plan.plan import Output, Wanted, WantedFile, gap, in_a_row
from parammap.plan.source_tensors import Parameter, SourceTensors
from parammap.tensors.arrangement import PADDING, REPLICATED, VOCAB, Sizes
from parammap.tensors.logical import MAIN_PARAM, TensorSpec
from parammap.tensors.names import shorten_names
from parammap.tensors.shard import Shard

POSITIONS = "embedding.position.weight"

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


@dataclass(frozen=True, slots=True)
class Public:
    """One of llm_serving's models."""

    name: str
    heads: int


#: llm_serving's models (get_config) by layers and hidden size; each with this vocabulary, and all
#: norms with this eps
PUBLIC = {
    (12, 768): Public("opt-125m", 12),
    (24, 2048): Public("opt-1.3b", 32),
    (32, 2560): Public("opt-2.7b", 32),
    (32, 4096): Public("opt-6.7b", 32),
    (48, 7168): Public("opt-30b", 56),
    (64, 9216): Public("opt-66b", 72),
    (96, 12288): Public("opt-175b", 96),
}
PUBLIC_VOCAB = 50272
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Options:
    """`dtype`, the dtype of the weights; `vocab_size`, the rows of the word embedding (None: the
    source's, its padding included); `activation`, what the user says of a source that does not
    record it."""

    dtype: str = "float16"
    vocab_size: int | None = None
    activation: str | None = None


def output(target: Checkpoint, options: Options = Options()) -> Output:
    """Plan the folder. Raises RefusedError for a model of another architecture, and for a dtype
    that numpy lacks."""
    states = states_of(target, options.vocab_size)
    is_bloom = architecture_of(target, options.activation).family == BLOOM
    architecture, tensors = (_bloom if is_bloom else _opt)(states, options)
    return Output(
        [WantedFile(one.spec.name, tuple(npy.frame(one.spec)), (one,)) for one in tensors],
        [(folder, "") for folder in target.rank_folders.values()],
        [],
        {"alpa": {**described(states, architecture), "dtype": options.dtype}},
        states=(MAIN_PARAM,),
        ignorable=BUFFERS,
    )


def _opt(states: SourceTensors, options: Options) -> tuple[Architecture, list[Wanted]]:
    files = opt_files(states.source.num_layers)
    check_names(states, set(files.values()), "Alpa's OPT")
    architecture = checked_opt(states, options.activation, "Alpa's OPT")
    _check_vocabulary(states, options)
    files |= {
        f"decoder.{name}": name for name in sorted(BUFFERS) if (MAIN_PARAM, name) in states.tensors
    }
    return architecture, [
        _wanted(path, states, name, options, rows_to_add(architecture))
        for path, name in files.items()
    ]


def _bloom(states: SourceTensors, options: Options) -> tuple[Architecture, list[Wanted]]:
    parameters = {one.canonical: one for one in states.parameters(HF_BLOOM)}
    there, expected = parameters.keys(), set(bloom_files(states.source.num_layers).values())
    for names, what in ((expected - there, "lacks"), (there - expected, "has, unlike it,")):
        if names:
            raise RefusedError(
                f"{states.source.folder}: cannot be Alpa's BLOOM: {what} "
                f"{shorten_names(sorted(names))}; the two models are of different architectures"
            )
    architecture = architecture_for(states.source, (BLOOM,), "Alpa's BLOOM", options.activation)
    if architecture.eps not in (None, EPS):
        raise RefusedError(
            f"{states.source.folder}: cannot be Alpa's BLOOM: its norms have eps "
            f"{architecture.eps} and not {EPS}"
        )
    sizes = Sizes(architecture.heads, architecture.heads)
    return architecture, [
        states.wanted(one, MAIN_PARAM, sizes, dtype=options.dtype) for one in parameters.values()
    ]


def bloom_files(num_layers: int) -> dict[str, str]:
    """The canonical (fused) name of each file of a BLOOM, whose head is the word embedding."""
    return {
        name: canonical
        for canonical, name, _ in tensors_of(HF_BLOOM, num_layers)
        if canonical != HEAD
    }


def opt_files(num_layers: int) -> dict[str, str]:
    """The canonical name of each file of an OPT."""
    return dict(_files(num_layers))


def _files(num_layers: int) -> Iterator[tuple[str, str]]:
    """(file name, canonical name) of each parameter, layer by layer."""
    for i in [None, *range(num_layers)]:
        for path, name in _FILES.items():
            if ("{i}" in path) == (i is not None):
                for w in ("weight", "bias") if "{w}" in path else ("weight",):
                    yield path.format(i=i, w=w), name.format(i=i, w=w)


def _wanted(
    path: str, states: SourceTensors, name: str, options: Options, rows_before: int
) -> Wanted:
    parts = parts_of(states, MAIN_PARAM, name, rows_before)
    shape = (
        sum(part.region.sizes[0] for part in parts),
        *states.tensor(MAIN_PARAM, name).shape[1:],
    )
    return Wanted(TensorSpec(path, options.dtype, shape), parts)


def states_of(source: Checkpoint, vocab_size: int | None) -> SourceTensors:
    """The source's tensors, with so many rows of words, or as many as there are, those of padding
    included."""
    states = SourceTensors(source, vocab_size)
    padding = states.tensors.get((MAIN_PARAM, f"{WORD_EMBEDDING}.{PADDING}"))
    return (
        states
        if vocab_size or not padding
        else SourceTensors(source, states.vocab_rows + padding.rows)
    )


def parts_of(states: SourceTensors, state: str, name: str, rows_before: int) -> tuple[Shard, ...]:
    """A parameter whole: a vocabulary as long as it shall be, positions behind so many rows of
    zeros."""
    tensor, kind = (
        states.tensor(MAIN_PARAM, name),
        VOCAB if name in (WORD_EMBEDDING, HEAD) else REPLICATED,
    )
    rows = states.vocab_rows if kind == VOCAB else tensor.rows
    parameter = Parameter(name, name, Row(name, kind), kind, (rows, *tensor.shape[1:]))
    parts = states.wanted(parameter, state, Sizes()).parts
    return (
        in_a_row([gap(rows_before, tensor.cols), *parts])
        if name == POSITIONS and rows_before
        else parts
    )


def rows_to_add(architecture: Architecture) -> int:
    """The rows that OPT's positions have before those of the source."""
    return FAMILIES[OPT].rows_before_positions - architecture.rows_before_positions


def check_names(states: SourceTensors, expected: set[str], model: str) -> None:
    """Refuse a source whose parameters are not just those of the model."""
    names = states.names() - BUFFERS
    missing, unknown = sorted(expected - names), sorted(names - expected)
    for strange, what in ((missing, "lacks {} of"), (unknown, "has {} that have no place in")):
        if strange:
            raise RefusedError(
                f"{states.source.folder}: {what.format(f'{len(strange)} tensors')} {model}: "
                f"{shorten_names(strange)}; the two models are of different architectures"
            )


def checked_opt(states: SourceTensors, stated: str | None, model: str) -> Architecture:
    """The architecture of a source that computes as OPT does; `stated` is the activation by the
    user's word. Raises RefusedError for another, as far as it says so."""
    architecture = architecture_for(states.source, (GPT2, OPT), model, stated)
    word, query, key = (
        states.tensor(MAIN_PARAM, name).shape
        for name in (WORD_EMBEDDING, "layers.0.attention.q.weight", "layers.0.attention.k.weight")
    )
    reasons = {
        f"its embedding has {word[1]} columns and its layers {query[1]}": word[1] != query[1],
        f"its attention has {query[0]} rows of queries and {key[0]} of keys": query[0] != key[0],
        f"its activation is {architecture.activation} and not relu": architecture.activation
        not in (None, "relu"),
        "it does not say what its activation is; tell with --activation": architecture.activation
        is None,
        f"its norms have eps {architecture.eps} and not {EPS}": architecture.eps not in (None, EPS),
    }
    for reason, applies in reasons.items():
        if applies:
            raise RefusedError(f"{states.source.folder}: cannot be {model}: {reason}")
    return architecture


def _check_vocabulary(states: SourceTensors, options: Options) -> None:
    public = PUBLIC.get((states.source.num_layers, states.tensor(MAIN_PARAM, WORD_EMBEDDING).cols))
    if public and states.vocab_rows != PUBLIC_VOCAB and options.vocab_size is None:
        raise RefusedError(
            f"{states.source.folder}: has {states.vocab_rows} rows of vocabulary, and "
            f"llm_serving's {public.name} takes {PUBLIC_VOCAB}; --vocab-size {PUBLIC_VOCAB} adds "
            f"copies of the last row, and --vocab-size {states.vocab_rows} is for a configuration "
            "of your own"
        )


def described(states: SourceTensors, architecture: Architecture) -> dict[str, int | None]:
    """The sizes that the model's configuration must have, by OPTConfig's names; heads None if
    nobody knows them."""
    source = states.source
    return {
        "num_hidden_layers": source.num_layers,
        "num_attention_heads": architecture.heads,
        "vocab_size": states.vocab_rows,
        "vocab_rows_added": states.vocab_rows - states_of(source, None).vocab_rows,
        "hidden_size": states.tensor(MAIN_PARAM, WORD_EMBEDDING).cols,
        "ffn_embed_dim": states.tensor(MAIN_PARAM, "layers.0.mlp.fc1.weight").rows,
    }
