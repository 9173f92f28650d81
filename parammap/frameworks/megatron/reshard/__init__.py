"""Re-laying: the same training state in another parallel layout, as a checkpoint that is not
written yet.

What comes out has all that a writer asks of a checkpoint, in the layout wanted; its tensors are
regions of the source's logical tensors, so that planning goes over the source's index. No tensor
data is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parammap import families
from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.checkpoint.index import Index, StoredTensor, TensorEntry, atom_name
from parammap.errors import RefusedError
from parammap.frameworks.megatron import architecture
from parammap.frameworks.megatron import before_core as megatron_before_core
from parammap.frameworks.megatron.buckets import Rule, release_of
from parammap.frameworks.megatron.facts import Facts
from parammap.frameworks.megatron.reshard.model import Entry, ModelEntries, WholeParameter, model_of
from parammap.frameworks.megatron.reshard.optimizer import ModelChunk, resharded_sidecar
from parammap.frameworks.megatron.reshard.rank_metadata import (
    GroupKind,
    TargetArguments,
    check_stages,
    resharded_metadata,
)
from parammap.frameworks.megatron.reshard.stages import Stages, stages_of
from parammap.frameworks.megatron.structure import (
    megatron_naming,
    nested,
    rank_folder,
    structures_of,
)
from parammap.frameworks.megatron.training_state import training_states
from parammap.tensors.arrangement import PADDING, VOCAB, arranged, local_shape
from parammap.tensors.layout import Place, TargetLayout
from parammap.tensors.logical import MODEL_PARAM, LogicalTensor, Stored, TensorSpec
from parammap.tensors.shard import Shard

#: the first megatron-core whose parameter groups come in the same order on all ranks
_GROUPS_SORTED = (0, 16)


def resharded(source: Checkpoint, target_layout: TargetLayout) -> Checkpoint:
    """The source's training state in the layout wanted. Raises RefusedError, with the numbers, for
    what does not divide."""
    return _Resharding(source, target_layout).checkpoint()


class _Resharding:
    def __init__(self, source: Checkpoint, target_layout: TargetLayout) -> None:
        self.source, self.target_layout, self.layout = source, target_layout, target_layout.layout
        self.facts = Facts.of_checkpoint(source)
        structures = structures_of(source)
        self.naming = megatron_naming(source, structures)
        self.model: ModelEntries = model_of(source, structures, self.naming)
        self.stages: Stages = stages_of(
            source.num_layers,
            self.layout,
            target_layout.stage_layers,
            self._recorded_layers(),
            self._knows_stages(),
        )
        self.tensors = {(tensor.state, tensor.name): tensor for tensor in source.index.shards}
        self.states = _states(source)
        self._check()
        self.vocab_rows = self._padded_vocab()

    def _knows_stages(self) -> bool:
        """Whether the release can be told any stages, also the embedding or the output alone in one
        (--pipeline-model-parallel-layout, core 0.13 and later)."""
        return "pipeline_model_parallel_layout" in self.facts.args or release_of(
            self.facts.recorded or {}
        ) >= (0, 13)

    def _recorded_layers(self) -> dict[tuple[int, int], int]:
        """How many layers each chunk of the source holds, by (pp, vpp)."""
        there, layers = self.source.layout, self.naming.layers or {}
        return {
            (pp, vpp): sum(map(len, layers.get((pp, vpp), {}).values()))
            for pp in range(there.pp)
            for vpp in range(there.vpp)
        }

    def _check(self) -> None:
        if self.model.experts % self.layout.ep:
            raise RefusedError(
                f"{self.model.experts} experts cannot be divided over ep {self.layout.ep}"
            )
        if self.layout.dp % self.layout.ep:
            raise RefusedError(
                f"dp {self.layout.dp} is no multiple of ep {self.layout.ep}; choose another with "
                f"--dp"
            )
        if self.layout.vpp > 1 == self.layout.pp:
            raise RefusedError(
                f"vpp {self.layout.vpp} needs several stages, and pp is 1; say --vpp 1"
            )
        if self.layout.etp != self.layout.tp:
            raise RefusedError(
                f"expert tensor parallel {self.layout.etp} cannot differ from tp {self.layout.tp} "
                f"yet"
            )
        if self.model.tied is None and (self.layout.pp == 1) != (self.source.layout.pp == 1):
            raise RefusedError(
                f"{self.source.folder}: nobody recorded whether the output layer is the word "
                f"embedding, on "
                f"which pp {self.source.layout.pp} → {self.layout.pp} depends; keep pp"
            )

    def _padded_vocab(self) -> int | None:
        """The rows of the table of words in the new layout: by the framework's rule where
        vocabulary and divisor are known and something about them changes, else as many as there
        are."""
        rows, vocab = self._source_vocab_rows(), self.naming.sizes.vocab
        if rows is None or (
            self.layout.tp == self.source.layout.tp and self.target_layout.divisible_by is None
        ):
            return rows
        return (
            self.facts.padded_vocab(vocab, self.layout.tp, self.target_layout.divisible_by) or rows
        )

    def _source_vocab_rows(self) -> int | None:
        return next(
            (
                parameter.shape[0]
                for parameter in self.model.parameters()
                if parameter.canonical == families.WORD_EMBEDDING
            ),
            None,
        )

    # -------------------------------------------------------------------------------------------------------
    # the whole

    def checkpoint(self) -> Checkpoint:
        ranks = {
            (tp, pp, ep): [self._chunk(tp, pp, vpp, ep) for vpp in range(self.layout.vpp)]
            for pp in range(self.layout.pp)
            for ep in range(self.layout.ep)
            for tp in range(self.layout.tp)
        }
        held = [
            one
            for rank, chunks in ranks.items()
            for number, chunk in enumerate(chunks)
            for one in self._held(rank, number, chunk)
        ]
        expert_dims = {
            len(parameter.shape)
            for entries in self.model.layers.values()
            for entry in entries
            if entry.is_of_experts and isinstance(parameter := entry.content, WholeParameter)
        }
        target = TargetArguments(
            self.layout, self._chunk_layers(), self.vocab_rows, self._divisor()
        )
        check_stages(self.facts.args, self._knows_stages(), target)
        metadata = {
            rank: resharded_metadata(self.source, target, rank, expert_dims, self._groups(chunks))
            for rank, chunks in ranks.items()
        }
        return Checkpoint(
            "megatron",
            self.source.folder,
            self.source.iteration,
            self.layout,
            Index(held, self.layout),
            self.source.with_optimizer,
            self.source.num_layers,
            describe=architecture.of,
            rank_folders={
                rank: self.source.folder / rank_folder(self.layout, rank) for rank in ranks
            },
            rank_metadata=metadata,
            training_states=training_states(metadata),
            structures={
                rank: [self._structure(chunk) for chunk in chunks] for rank, chunks in ranks.items()
            },
            sidecar=resharded_sidecar(
                self.source,
                self.naming,
                self.facts,
                self.layout,
                self._model_facts(),
                bool(self.model.tied),
                ranks,
            ),
            dropped=self.source.dropped,
            notes=[*self.source.notes, *self._notes()],
        )

    def _chunk(self, tp: int, pp: int, vpp: int, ep: int) -> ModelChunk:
        layers = self.stages.get((pp, vpp), range(0))
        is_first, is_last = (
            (pp, vpp) == (0, 0),
            (pp, vpp) == (self.layout.pp - 1, self.layout.vpp - 1),
        )
        entries = list(self.model.chunk(layers, self._experts(ep), is_first, is_last))
        shapes = {
            entry.name: self._local_shape(entry, entry.content)
            for entry in entries
            if isinstance(entry.content, WholeParameter)
        }
        return ModelChunk(entries, shapes, layers, is_first, is_last)

    def _experts(self, ep: int) -> range:
        """The global numbers of an expert rank's experts."""
        count = self.model.experts // self.layout.ep
        return range(ep * count, (ep + 1) * count)

    def _local_shape(self, entry: Entry, parameter: WholeParameter) -> tuple[int, ...]:
        shape = parameter.shape
        if parameter.kind == VOCAB and self.vocab_rows is not None:
            shape = self.vocab_rows, *shape[1:]
        try:
            return local_shape(
                parameter.kind, shape, self.layout.tp, self.naming.sizes, self.layout.ep
            )
        except RefusedError as error:
            raise RefusedError(
                f"{self.source.folder}: {entry.name} {list(shape)}: {error}"
            ) from error

    # -----------------------------------------------------------------------------------------------------
    # its tensors

    def _held(self, rank: Coordinates, number: int, chunk: ModelChunk) -> Iterator[StoredTensor]:
        tp, pp, ep = rank
        place, sizes = Place(tp, pp, ep, number), self.naming.sizes
        for entry in chunk.entries:
            parameter = entry.content
            if isinstance(parameter, WholeParameter):
                shape = chunk.shapes[entry.name]
                parts = arranged(
                    parameter.kind, shape, self.layout.tp, tp, sizes, self._experts(ep)
                )
                for state in self.states.get(parameter.canonical, ()):
                    tensors = [self._tensor(state, parameter, one.name, one.shape) for one in parts]
                    shards = tuple(
                        Shard(tensor, one.region, one.view)
                        for tensor, one in zip(tensors, parts, strict=True)
                    )
                    found = TensorEntry(
                        entry.name, place, state, Stored(tensors[0].dtype, shape, ())
                    )
                    yield StoredTensor(
                        found, parameter.canonical, parameter.row, parameter.kind, shards
                    )

    def _tensor(
        self, state: str, parameter: WholeParameter, part: str, shape: tuple[int, ...]
    ) -> LogicalTensor:
        """The source's logical tensor of a part; a vocabulary's padding has as many rows as this
        layout has."""
        name = atom_name(parameter.canonical, parameter.kind, part)
        if part == PADDING:
            return LogicalTensor(state, name, self.tensors[state, parameter.canonical].dtype, shape)
        return self.tensors[state, name]

    def _structure(self, chunk: ModelChunk) -> dict[str, Any]:
        return nested(
            (
                entry.keys,
                TensorSpec(entry.name, entry.content.dtype, chunk.shapes[entry.name])
                if isinstance(entry.content, WholeParameter)
                else entry.content,
            )
            for entry in chunk.entries
        )

    # --------------------------------------------------------------------------------------------------
    # what it says

    def _chunk_layers(self) -> tuple[int, ...]:
        return tuple(
            len(self.stages.get((pp, vpp), ()))
            for vpp in range(self.layout.vpp)
            for pp in range(self.layout.pp)
        )

    def _divisor(self) -> int | None:
        return self.target_layout.divisible_by or self.facts.model.get(
            "make_vocab_size_divisible_by"
        )

    def _groups(self, chunks: list[ModelChunk]) -> list[GroupKind]:
        """The kinds of a rank's dense parameter groups, in the order in which its parameters first
        need them; none where all ranks have the same (megatron-core, optimizer/__init__.py,
        _get_param_groups: order of need in 0.6 … 0.15, then sorted; loaded by position up to 0.12;
        before core, weights that decay come first)."""
        sidecar = self.source.sidecar
        if (
            sidecar is None
            or megatron_before_core.describes(sidecar)
            or (Rule.of(self.facts.recorded, self.facts.args, self.layout).core >= _GROUPS_SORTED)
        ):
            return []
        has_own_rate = bool(self.facts.args.get("decoupled_lr"))
        dense = [
            (entry.name, entry.content)
            for chunk in chunks
            for entry in chunk.entries
            if isinstance(entry.content, WholeParameter)
            and (not entry.is_of_experts or self.layout.ep == 1)
        ]
        return list(
            dict.fromkeys(
                (
                    not name.endswith(".bias") and len(parameter.shape) > 1,
                    has_own_rate and parameter.kind == VOCAB,
                )
                for name, parameter in dense
            )
        )

    def _notes(self) -> Iterator[str]:
        there, rows = self.source.layout, self._source_vocab_rows()
        if self.vocab_rows != rows:
            yield f"vocabulary padded to {self.vocab_rows} rows, from {rows}" + (
                ": the new ones repeat the last one" if (self.vocab_rows or 0) > (rows or 0) else ""
            )
        has_random = any(state.random_state for state in self.source.training_states.values())
        if has_random and (self.layout.tp > there.tp or self.layout.pp > there.pp):
            yield (
                f"random states: only tp {there.tp} × pp {there.pp} ranks have any, further ranks "
                "repeat them; without dropout nothing depends on it"
            )

    def _model_facts(self) -> dict[str, Any]:
        known = (
            self.facts.recorded["model"]
            if self.facts.recorded
            else {
                name: value
                for name, value in self.facts.args.items()
                if isinstance(value, (bool, int, float, str, type(None)))
            }
        )
        return {
            **known,
            "padded_vocab_size": self.vocab_rows,
            "make_vocab_size_divisible_by": self._divisor(),
            "vocab_size": self.naming.sizes.vocab or known.get("vocab_size"),
        }


def _states(source: Checkpoint) -> dict[str, list[str]]:
    """The states that the source holds of each parameter."""
    states: dict[str, dict[str, None]] = {}
    for held in source.index.held:
        if held.found.state != MODEL_PARAM:
            states.setdefault(held.canonical, {})[held.found.state] = None
    return {canonical: list(known) for canonical, known in states.items()}
