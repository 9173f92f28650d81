"""A source's logical tensors as another framework keeps them: for targets that a table of names
describes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from parammap import families
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import atom_name, atoms
from parammap.errors import RefusedError
from parammap.families import HEAD, WORD_EMBEDDING, Row
from parammap.plan.plan import Wanted
from parammap.tensors.arrangement import (
    GATE_UP,
    KVQ,
    PADDING,
    QKV,
    SHARD_0,
    STACKED_QKV,
    VOCAB,
    Sizes,
    arranged,
    local_shape,
)
from parammap.tensors.logical import MAIN_PARAM, LogicalTensor, TensorSpec
from parammap.tensors.names import shorten_names
from parammap.tensors.shard import transposed

#: the atoms of fused tensors that a model may have as one or apart
_PARTS = {
    QKV: ("q", "k", "v"),
    STACKED_QKV: ("q", "k", "v"),
    KVQ: ("k", "v", "q"),
    GATE_UP: ("gate", "up"),
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the target's model: its name and canonical name there, its row in the
    dialect's table, how it is put together, and its whole shape, [out, in]."""

    name: str
    canonical: str
    row: Row
    kind: str
    shape: tuple[int, ...]


class SourceTensors:
    """The logical tensors of a source by state and name, with `vocab_rows` rows of words (None: as
    many as the vocabulary truly has, or, where nobody recorded that, as there are)."""

    def __init__(self, source: Checkpoint, vocab_rows: int | None = None) -> None:
        self.source = source
        self.tensors = {(tensor.state, tensor.name): tensor for tensor in source.index.shards}
        words = self.tensor(MAIN_PARAM, WORD_EMBEDDING).rows
        self.vocab_rows = vocab_rows or words
        if self.vocab_rows < words:
            raise RefusedError(
                f"{source.folder}: has a vocabulary of {words}, of which {self.vocab_rows} rows "
                "would cut off a part; ask for at least as many"
            )

    def names(self) -> set[str]:
        """The canonical names of the weights, padding of the vocabulary left out."""
        return {
            name
            for state, name in self.tensors
            if state == MAIN_PARAM and not name.endswith(f".{PADDING}")
        }

    def tensor(self, state: str, name: str) -> LogicalTensor:
        if (state, name) not in self.tensors:
            raise RefusedError(f"{self.source.folder}: holds no {state} of {name}")
        return self.tensors[state, name]

    def parameters(
        self, dialect: str, ignorable: frozenset[str] = frozenset()
    ) -> Iterator[Parameter]:
        """What of a dialect's model the source has, in the table's order, layer by layer.

        Raises RefusedError for a tensor of the source that has no place in it (but those that are
        `needless`), and for one of which only some parts are there."""
        used: set[str] = set()
        experts = families.experts_in(self.names())
        for canonical, name, row in families.tensors_of(dialect, self.source.num_layers, experts):
            kind, parts = self.parts(canonical, row.arrangement)
            there = [part for part in parts if (MAIN_PARAM, part) in self.tensors]
            if not there:
                continue
            if missing := sorted(set(parts) - set(there)):
                raise RefusedError(
                    f"{self.source.folder}: lacks {shorten_names(missing)}, a part of {name}"
                )
            used |= set(parts)
            yield Parameter(name, canonical, row, kind, self._shape(kind, parts))
        if unplaced := sorted(self.names() - used - ignorable):
            raise RefusedError(
                f"{self.source.folder}: has {len(unplaced)} tensors that have no place in "
                f"{dialect}: "
                f"{shorten_names(unplaced)}; the two models are of different architectures"
            )

    def wanted(
        self,
        parameter: Parameter,
        state: str,
        sizes: Sizes,
        *,
        dtype: str | None = None,
        tp: int = 1,
        rank: int = 0,
        name: str | None = None,
    ) -> Wanted:
        """A rank's share of a parameter, or of one of its moments, in the dialect's orientation.
        `dtype` None: as it is; `name` None: the parameter's own."""
        sizes = replace(sizes, vocab=self.tensor(state, WORD_EMBEDDING).rows)
        shape = local_shape(parameter.kind, parameter.shape, tp, sizes)
        stored = self._dtype(state, parameter)
        parts = atoms(
            state,
            parameter.canonical,
            parameter.kind,
            stored,
            arranged(parameter.kind, shape, tp, rank, sizes),
        )
        is_transposed = parameter.row.transposed and len(shape) == 2
        spec = TensorSpec(
            name or parameter.name, dtype or stored, shape[::-1] if is_transposed else shape
        )
        return Wanted(spec, transposed(parts, shape) if is_transposed else parts)

    def parts(self, canonical: str, arrangement: str) -> tuple[str, tuple[str, ...]]:
        """How a tensor of the dialect is put together of the source's, and of which: a model
        without gates has plain fc1."""
        if arrangement == GATE_UP and (MAIN_PARAM, canonical) in self.tensors:
            return SHARD_0, (canonical,)
        return arrangement, tuple(
            atom_name(canonical, arrangement, part) for part in _PARTS.get(arrangement, ("",))
        )

    def _shape(self, kind: str, parts: tuple[str, ...]) -> tuple[int, ...]:
        tensors = [self.tensor(MAIN_PARAM, part) for part in parts]
        rows = (
            self.vocab_rows
            if kind == VOCAB and parts[0] in (WORD_EMBEDDING, HEAD)
            else sum(t.rows for t in tensors)
        )
        return (rows, *tensors[0].shape[1:])

    def _dtype(self, state: str, parameter: Parameter) -> str:
        _, parts = self.parts(parameter.canonical, parameter.row.arrangement)
        return self.tensor(state, parts[0]).dtype
