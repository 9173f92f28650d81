"""Model families: from a tensor's name in one dialect to its canonical name, its arrangement and
its other names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache

from parammap.families import deepspeed, gpt, hugging_face, merak, opt, yuan

FAMILIES = (gpt, yuan, opt)
#: all rows; what families share stands in gpt's table, and metaseq's dialect has one of its own
ROWS = gpt.ROWS_OF_TABLE | yuan.ROWS_OF_TABLE

LEGACY, CORE, MINDSPORE, METASEQ, DEEPSPEED = "legacy", "core", "mindspore", "metaseq", "deepspeed"
#: transformers' dialects, by the family of the model, and Merak's for one tensor-parallel rank and
#: for several
HF_GPT2, HF_OPT, HF_LLAMA, HF_BLOOM, MERAK, MERAK_CUT = (
    "gpt2",
    "opt",
    "llama",
    "bloom",
    "merak",
    "merak_cut",
)
#: canonical name: (arrangement, name in the dialect[, TRANSPOSED]), of dialects with one name for
#: each tensor
TABLES = {
    METASEQ: opt.METASEQ,
    DEEPSPEED: deepspeed.TENSORS,
    HF_GPT2: hugging_face.GPT2,
    HF_OPT: hugging_face.OPT,
    HF_LLAMA: hugging_face.LLAMA,
    HF_BLOOM: hugging_face.BLOOM,
    MERAK: merak.WHOLE,
    MERAK_CUT: merak.CUT,
}
#: what may stand before a name of a dialect's table
_PREFIXES = {
    HF_GPT2: r"transformer\.",
    HF_BLOOM: r"transformer\.",
    HF_LLAMA: r"model\.",
    HF_OPT: r"model\.",
    MERAK: r"module\.\d+\.(transformer\.)?",
    MERAK_CUT: r"module\.\d+\.(transformer\.)?",
}
#: the table that a model may hold twice, as its input and as its output
WORD_EMBEDDING, HEAD = "embedding.word.weight", "output.weight"
#: names of a head that by themselves say that it is the word embedding
TIED_HEADS = ("word_embeddings_for_head.weight",)

#: names that are taken apart once: ranks, states and layouts repeat them
_NAMES = 1 << 16
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)|(?<=\bh\.)\d+(?=\.)")
_EXPERT = re.compile(
    r"(?<=experts\.)\d+(?=\.)|(?<=linear_fc[12]\.weight)\d+$|(?<=linear_fc[12]\.bias)\d+$"
)


@dataclass(frozen=True, slots=True)
class Row:
    """What a family knows of one tensor, with `{i}` and `{e}` standing for the layer and the
    expert; `transposed`: as a matrix it is [in, out] in the dialect."""

    canonical: str
    arrangement: str
    mindspore: str | None
    transposed: bool = False


@lru_cache(maxsize=_NAMES)
def layer_of(name: str) -> tuple[str, int] | None:
    """The path of the layer list and the local layer number in a checkpoint's name:
    'decoder.layers.3.mlp…' → …, 3."""
    match = _LAYER.search(name)
    return (name[: match.start() - 1], int(match.group())) if match else None


@lru_cache(maxsize=_NAMES)
def expert_of(name: str) -> int | None:
    match = _EXPERT.search(name)
    return int(match.group()) if match else None


def before_expert(name: str) -> str | None:
    """What stands before the number of the expert in a name."""
    match = _EXPERT.search(name)
    return name[: match.start()] if match else None


@lru_cache(maxsize=_NAMES)
def renumber(name: str, layer: int | None, expert: int | None) -> str:
    """`name` with its layer and expert numbers replaced by the given ones; None leaves them."""
    if layer is not None:
        name = _LAYER.sub(str(layer), name, count=1)
    if expert is not None:
        name = _EXPERT.sub(str(expert), name, count=1)
    return name


@lru_cache(maxsize=_NAMES)
def find(name: str, dialect: str) -> Row | None:
    """The family's row of a checkpoint's tensor name, or None if no family knows it."""
    name = re.sub(f"^({_PREFIXES[dialect]})", "", name) if dialect in _PREFIXES else name
    pattern = _EXPERT.sub("{e}", _LAYER.sub("{i}", name, count=1), count=1)
    return _by_name(dialect).get(pattern)


def renamed(name: str) -> str:
    """The canonical name of a tensor that an earlier version knew by megatron-core's name, under
    global numbers; others keep theirs."""
    row, layer = find(name, CORE), layer_of(name)
    return row.canonical.format(i=layer and layer[1], e=expert_of(name)) if row else name


@cache
def rows_of(dialect: str) -> dict[str, tuple[str, Row]]:
    """By canonical name (fused), each tensor of a dialect of TABLES: its name and its row."""
    rows = {}
    for canonical, (arrangement, name, *transposed) in TABLES[dialect].items():
        for w in ("weight", "bias") if "{w}" in canonical else ("",):
            row = Row(canonical.replace("{w}", w), arrangement, None, bool(transposed))
            rows[row.canonical] = name.replace("{w}", w), row
    return rows


def missing(canonicals: set[str], num_layers: int) -> list[str]:
    """The canonical names that a complete model of `num_layers` layers has and `canonicals` lacks,
    by the family that fits best."""
    lists = [
        *((family.REQUIRED, family.REQUIRED_IN_LAYER) for family in FAMILIES),
        (gpt.REQUIRED, gpt.REQUIRED_IN_LATENT_LAYER),
        *hugging_face.REQUIRED,
    ]
    required = [
        once + [f"layers.{i}.{name}" for i in range(num_layers) for name in in_layer]
        for once, in_layer in lists
    ]
    return min(([name for name in names if name not in canonicals] for names in required), key=len)


def dialect_of(names: list[str]) -> str:
    if any(find(name, MINDSPORE) and not find(name, LEGACY) for name in names):
        return MINDSPORE
    return (
        LEGACY
        if any(name.startswith(("language_model.", "word_embeddings")) for name in names)
        else CORE
    )


@cache
def _by_name(dialect: str) -> dict[str, Row]:
    if dialect in TABLES:
        return dict(rows_of(dialect).values())
    rows = {}
    for canonical, (arrangement, legacy, core, mindspore) in ROWS.items():
        for w in ("weight", "bias") if "{w}" in canonical else ("weight",):
            pattern = mindspore and mindspore.replace("{w}", w).replace("{norm_w}", f"{{norm_{w}}}")
            row = Row(canonical.replace("{w}", w), arrangement, pattern)
            names = {LEGACY: legacy, CORE: core, MINDSPORE: _norm_variants(pattern)}[dialect]
            rows.update((name.replace("{w}", w), row) for name in names)
    return rows


def _norm_variants(pattern: str | None) -> list[str]:
    """A MindSpore name as LayerNorm and as RMSNorm have it."""
    if pattern is None:
        return []
    return [
        pattern.replace("{norm_weight}", weight).replace("{norm_bias}", bias)
        for weight, bias in (("gamma", "beta"), ("weight", "bias"))
    ]
