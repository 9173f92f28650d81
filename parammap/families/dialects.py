"""Names in a dialect: which tensor of a family one means, and what of it is a number of a layer or
an expert."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from parammap.families.family import Row
from parammap.families.registry import FAMILIES, remembered

#: dialects of Megatron-LM and its descendants, metaseq's, and Merak's for one tensor-parallel rank
#: and for several; transformers' have the names of the families
LEGACY, CORE, MINDSPORE, METASEQ, DEEPSPEED, MERAK, MERAK_CUT = (
    "legacy",
    "core",
    "mindspore",
    "metaseq",
    "deepspeed",
    "merak",
    "merak_cut",
)
#: the table that a model may hold twice, as its input and as its output
WORD_EMBEDDING, HEAD = "embedding.word.weight", "output.weight"
#: names of a head that by themselves say that it is the word embedding
TIED_HEADS = ("word_embeddings_for_head.weight",)

#: the number of a layer or an expert; a larger one in a name is none, and its tensor is not known
_NUMBER = "[0-9]{1,5}"
_LAYER = re.compile(rf"(?<=layers\.){_NUMBER}(?=\.)|(?<=\bh\.){_NUMBER}(?=\.)")
_EXPERT = re.compile(
    rf"(?<=experts\.){_NUMBER}(?=\.)|(?<=linear_fc[12]\.weight){_NUMBER}$"
    rf"|(?<=linear_fc[12]\.bias){_NUMBER}$"
)


@remembered
def layer_of(name: str) -> tuple[str, int] | None:
    """The path of the layer list and the local layer number in a checkpoint's name:
    'decoder.layers.3.mlp…' → …, 3."""
    match = _LAYER.search(name)
    return (name[: match.start() - 1], int(match.group())) if match else None


@remembered
def expert_of(name: str) -> int | None:
    match = _EXPERT.search(name)
    return int(match.group()) if match else None


def experts_in(names: Iterable[str]) -> int:
    """How many experts the names are of."""
    return 1 + max((e for name in names if (e := expert_of(name)) is not None), default=-1)


def before_expert(name: str) -> str | None:
    """What stands before the number of the expert in a name."""
    match = _EXPERT.search(name)
    return name[: match.start()] if match else None


@remembered
def renumber(name: str, layer: int | None, expert: int | None) -> str:
    """`name` with its layer and expert numbers replaced by the given ones; None leaves them."""
    if layer is not None:
        name = _LAYER.sub(str(layer), name, count=1)
    if expert is not None:
        name = _EXPERT.sub(str(expert), name, count=1)
    return name


@remembered
def find(name: str, dialect: str) -> Row | None:
    """The families' row of a checkpoint's tensor name, or None if no family knows it."""
    prefix, rows = _by_name(dialect)
    name = re.sub(f"^({prefix})", "", name) if prefix else name
    return rows.get(_EXPERT.sub("{e}", _LAYER.sub("{i}", name, count=1), count=1))


def renamed(name: str) -> str:
    """The canonical name of a tensor that an earlier version knew by megatron-core's name, under
    global numbers; others keep theirs."""
    row, layer = find(name, CORE), layer_of(name)
    return row.canonical.format(i=layer and layer[1], e=expert_of(name)) if row else name


@remembered
def rows_of(dialect: str) -> dict[str, tuple[str, Row]]:
    """By canonical name (fused), each tensor of a dialect: its first name and its row, in the order
    of the families' tables."""
    return {canonical: (row.names[0], row) for canonical, row in _rows(dialect).items()}


def tensors_of(dialect: str, layers: int, experts: int = 0) -> Iterator[tuple[str, str, Row]]:
    """Each tensor of a model, in the order of the families' tables, layer by layer, expert by
    expert: its canonical name (fused), its first name, and its row."""
    for in_layer, of_layer in _runs(_rows(dialect).values(), "{i}"):
        for i in range(layers) if in_layer else (None,):
            for of_expert, rows in _runs(of_layer, "{e}"):
                for e in range(experts) if of_expert else (None,):
                    for row in rows:
                        yield row.canonical.format(i=i, e=e), row.names[0].format(i=i, e=e), row


def _runs(rows: Iterable[Row], number: str) -> list[tuple[bool, list[Row]]]:
    """The rows in runs of those whose names have a number, and of those that have none."""
    runs = groupby(rows, key=lambda row: number in row.canonical)
    return [(has, list(run)) for has, run in runs]


def names_of(canonical: str, dialect: str) -> tuple[str, ...]:
    """The names of a tensor in a dialect; none if it has no such tensor."""
    row = _rows(dialect).get(canonical)
    return row.names if row else ()


def dialect_of(names: list[str]) -> str:
    if any(find(name, MINDSPORE) and not find(name, LEGACY) for name in names):
        return MINDSPORE
    return (
        LEGACY
        if any(name.startswith(("language_model.", "word_embeddings")) for name in names)
        else CORE
    )


@remembered
def _by_name(dialect: str) -> tuple[str, dict[str, Row]]:
    """The pattern of what may stand before a dialect's names, and its rows by name."""
    prefixes = [one.prefix(dialect) for one in FAMILIES.values() if dialect in one.tables]
    rows = {name: row for row in _rows(dialect).values() for name in row.names}
    return "|".join(filter(None, dict.fromkeys(prefixes))), rows


@remembered
def _rows(dialect: str) -> dict[str, Row]:
    """The rows of all families that have the dialect; a tensor that a second one adds comes behind
    the one that it comes behind there."""
    tables = [one.tables[dialect] for one in FAMILIES.values() if dialect in one.tables]
    order: list[str] = []
    for table in tables:
        place = 0
        for canonical in table:
            if canonical not in order:
                order.insert(place, canonical)
            place = order.index(canonical) + 1
    known = {canonical: row for table in tables for canonical, row in table.items()}
    return {canonical: known[canonical] for canonical in order}
