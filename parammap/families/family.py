"""What a model family is: a row for each tensor, a column for each dialect, and what config.json
says of its models.

A dialect is the set of names that one framework gives tensors. In a table, `{i}` stands for the
layer, `{e}` for the expert and `{w}` for weight and bias alike; `{affine}` is what MindSpore's
LayerNorm calls these two."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

#: the column of the names in transformers' files, which make a dialect for each family: config.json
#: tells the family, and the names of two families may contradict each other
TRANSFORMERS = "transformers"
_AFFINE = {"weight": "gamma", "bias": "beta"}
#: how a family normalizes, and how it tells positions: what frameworks have for several families
LAYER_NORM, RMS_NORM = "LayerNorm", "RMSNorm"
LEARNED, ROTARY, ALIBI = "learned", "rotary", "alibi"


@dataclass(frozen=True, slots=True)
class Cell:
    """A tensor in one dialect: its names (several mean the same tensor), its arrangement where that
    is not the row's, and whether, as a matrix, it is [in, out]."""

    names: str | tuple[str, ...]
    arrangement: str | None = None
    transposed: bool = False

    @property
    def all_names(self) -> tuple[str, ...]:
        return (self.names,) if isinstance(self.names, str) else self.names

    def renamed(self, change: Callable[[str], str]) -> Cell:
        return replace(self, names=tuple(map(change, self.all_names)))


@dataclass(frozen=True, slots=True)
class TableRow:
    """A tensor: its canonical name, its arrangement (None: as in a table that the family shares),
    and its cell in each column."""

    canonical: str
    arrangement: str | None
    cells: Mapping[str, Cell]


def row(
    canonical: str, arrangement: str | None = None, **columns: str | tuple[str, ...] | Cell
) -> TableRow:
    """A row of a family's table: a name, several names, or a Cell for each dialect that has the
    tensor."""
    cells = {
        column: cell if isinstance(cell, Cell) else Cell(cell) for column, cell in columns.items()
    }
    return TableRow(canonical, arrangement, cells)


def in_layer(prefixes: Mapping[str, str], *rows: TableRow) -> tuple[TableRow, ...]:
    """Rows of a layer, written without what stands before each of their names: `prefixes` by
    column, and `layers.{i}.` in canonical names."""
    return tuple(
        TableRow(
            f"layers.{{i}}.{one.canonical}",
            one.arrangement,
            {column: cell.renamed(prefixes[column].__add__) for column, cell in one.cells.items()},
        )
        for one in rows
    )


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor in one dialect, with `{i}` and `{e}` standing for the layer and the expert."""

    canonical: str
    arrangement: str
    transposed: bool = False
    names: tuple[str, ...] = ()


#: whether a model has the tensors of such canonical names, by its settings; those that nothing is
#: said of, it has
Presence = Mapping[str, Callable[[Mapping[str, Any]], bool]]
_nothing = partial(field, default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelType:
    """A model_type: the classes of the whole model and of the one without a head, the settings'
    values where config.json is silent, and which tensors it has.

    `as_family` are settings that make a model compute otherwise than its family does, where they
    differ from these values. A configuration is made anew with the last type of which all
    `written_where` holds, whether a model has the tensors of these canonical names (None: never);
    `from_tensors` are the settings that are written by whether it has a tensor, and `fixed` those
    that are always the same."""

    causal: str
    base: str
    defaults: Mapping[str, Any] = _nothing()
    presence: Presence = _nothing()
    as_family: Mapping[str, Any] = _nothing()
    written_where: Mapping[str, bool] | None = _nothing()
    from_tensors: Mapping[str, str] = _nothing()
    fixed: Mapping[str, Any] = _nothing()


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What config.json says of a family's models, by model_type in `types`.

    `settings` are the names that say each field of an Architecture: the first one is written, the
    others are aliases of it. `constant` are fields that no setting says, as they are the same in
    every model. `sizes` are settings of sizes that are no field of an Architecture, by the size's
    name (`experts` are the `{e}`, `words` the columns of the word embedding), and `shapes` the
    sizes [out, in] of tensors that the family alone has. `prefix` is what stands before the names of
    a whole model's tensors, the head's excepted, and `buffers` are ends of the names of buffers that
    old releases saved."""

    types: Mapping[str, ModelType]
    settings: Mapping[str, tuple[str, ...]]
    constant: Mapping[str, Any] = _nothing()
    sizes: Mapping[str, str] = _nothing()
    shapes: Mapping[str, tuple[str, ...]] = _nothing()
    prefix: str = ""
    buffers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family. `rows` are in the order of transformers' state dict; of the tables that it
    `shares` with others, rows of the same canonical name are joined with its own, which count
    first, and the others follow.

    `prefixes` are patterns of what may stand before the names of a dialect. `together` are the
    canonical names within a layer of which each has its meaning only with the others. `buffers` are
    canonical names that a checkpoint may have without the model computing with it.
    `rows_before_positions` are the rows of the table of positions before the first token's.

    `norm`, `positions` and `gated` (whether the MLP has gate and up) say what models of the family
    compute; None for a family whose models no other family's framework computes."""

    name: str
    title: str
    rows: tuple[TableRow, ...]
    shares: tuple[tuple[TableRow, ...], ...] = ()
    prefixes: Mapping[str, str] = _nothing()
    together: tuple[frozenset[str], ...] = ()
    config: Config | None = None
    buffers: frozenset[str] = frozenset()
    rows_before_positions: int = 0
    norm: str | None = None
    positions: str | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        if unarranged := [
            one.canonical
            for one in self._joined
            if not one.arrangement and not all(cell.arrangement for cell in one.cells.values())
        ]:
            raise ValueError(f"{self.name}: {', '.join(unarranged)} has no arrangement")
        if (TRANSFORMERS in self.dialects) != (self.config is not None):
            raise ValueError(f"{self.name}: transformers' names and config.json go together")

    @property
    def computes(self) -> tuple[str | None, str | None, bool]:
        """What its models compute: norm, positions, and whether the MLP is gated."""
        return self.norm, self.positions, self.gated

    @cached_property
    def dialects(self) -> tuple[str, ...]:
        """The columns of its table: what tells which frameworks have its models."""
        return tuple(dict.fromkeys(column for one in self._joined for column in one.cells))

    @cached_property
    def tables(self) -> dict[str, dict[str, Row]]:
        """What its table says, by dialect and canonical name."""
        return {
            self.name if column == TRANSFORMERS else column: {
                one.canonical: Row(
                    one.canonical,
                    cell.arrangement or one.arrangement or "",
                    cell.transposed,
                    cell.all_names,
                )
                for one in self._joined
                if (cell := one.cells.get(column))
            }
            for column in self.dialects
        }

    def prefix(self, dialect: str) -> str:
        """The pattern of what may stand before the names of a dialect of its table."""
        if dialect == self.name and self.config:
            return re.escape(self.config.prefix)
        return self.prefixes.get(dialect, "")

    @cached_property
    def _joined(self) -> list[TableRow]:
        """The rows of all its tables, of weight and bias apart."""
        joined: dict[str, TableRow] = {}
        for one in _expanded(line for table in (self.rows, *self.shares) for line in table):
            known = joined.get(one.canonical, one)
            joined[one.canonical] = TableRow(
                one.canonical,
                known.arrangement or one.arrangement,
                {**one.cells, **known.cells},
            )
        return list(joined.values())


def _expanded(rows: Iterable[TableRow]) -> Iterator[TableRow]:
    """The rows with `{w}` as two."""
    for one in rows:
        for w in _AFFINE if "{w}" in one.canonical else ("weight",):

            def named(name: str, w: str = w) -> str:
                return name.replace("{w}", w).replace("{affine}", _AFFINE[w])

            cells = {column: cell.renamed(named) for column, cell in one.cells.items()}
            yield TableRow(named(one.canonical), one.arrangement, cells)
