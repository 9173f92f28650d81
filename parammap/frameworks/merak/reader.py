"""Reading Merak's checkpoints of GPT-2: which tensors are in which file, and which box of the model
each is.

A file's `model` names a tensor `module.{M}.` and transformers' name, M counting the modules of the
whole pipeline; a stage is whatever its file holds. `tied_modules.*` names the word embedding, or
the head that is tied to it, a second time.

Sources: Merak d72efe5, v2.2.2; see families/gpt2.py, files.py and zero.py for each part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parammap import families
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import Index, NameResolver, StoredTensor, TensorEntry, in_state
from parammap.checkpoint.training_state import ParamGroup, TrainingState, steps_of
from parammap.errors import RefusedError
from parammap.families import HEAD, MERAK, MERAK_CUT
from parammap.formats import torch_legacy, tree_schema
from parammap.formats.tree_schema import dict_of, kind
from parammap.frameworks.framework import EVERYTHING, ReadOptions
from parammap.frameworks.megatron.facts import args_of
from parammap.frameworks.megatron.saved import METADATA
from parammap.frameworks.megatron.training_state import random_state_in, said_by
from parammap.frameworks.merak import zero
from parammap.frameworks.merak.architecture import find_config, said
from parammap.frameworks.merak.files import MerakFiles, find, recognizes
from parammap.tensors.arrangement import VOCAB, Sizes
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import MAIN_PARAM, MODEL_PARAM, Stored
from parammap.tensors.names import shorten_names

__all__ = ["read", "recognizes"]

#: buffers that GPT-2 or the tracer computes by itself
_BUFFER = re.compile(
    r"module\.\d+\.(transformer\.h\.\d+\.attn\.(bias|masked_bias)|_tensor_constant\d+)"
)
#: in names of several tensor-parallel ranks
_CUT_NAMES = (".col_linear.", ".row_linear.")


@dataclass(slots=True)
class MerakRank:
    """One rank's model file: its place, its content (tensors as Stored), its tensors by name,
    aliases and buffers apart."""

    path: Path
    place: Place
    content: dict[str, Any]
    names: dict[str, Stored]
    tied: dict[str, Stored]
    buffers: list[str]

    @classmethod
    def read(cls, path: Path, place: Place) -> MerakRank:
        content = torch_legacy.read_either(path)
        model = content.get("model") if isinstance(content, dict) else None
        if not isinstance(model, dict) or not all(
            isinstance(value, Stored) for value in model.values()
        ):
            raise RefusedError(f"{path}: holds no `model` of tensors; is it Merak's?")
        tree_schema.check(content, METADATA, path)
        tree_schema.check(model, dict_of(kind(str), kind(Stored)), path)
        tied = {name: stored for name, stored in model.items() if zero.TIED.fullmatch(name)}
        buffers = [name for name in model if _BUFFER.fullmatch(name)]
        names = {
            name: stored
            for name, stored in model.items()
            if name not in tied and name not in buffers
        }
        return cls(path, place, content, names, tied, buffers)

    def own_name(self, name: str) -> str:
        """A parameter's name; of one that goes by that of its tie, that of the word embedding or
        head of this rank."""
        words = [own for own in self.names if own.endswith((".wte.weight", ".lm_head.weight"))]
        own = next(iter(words), "") if zero.TIED.fullmatch(name) else name
        if own not in self.names:
            raise RefusedError(
                f"{self.path}: holds no tensor for {name}, which its optimizer or a tie names; "
                "copy the whole checkpoint"
            )
        return own

    def tensors(self) -> Iterator[tuple[str, Stored]]:
        """What the model consists of; a tie that is no mere second name of another tensor is a
        replica of its own."""
        yield from self.names.items()
        there = {stored.extents for stored in self.names.values()}
        yield from (
            (self.own_name(name), stored)
            for name, stored in self.tied.items()
            if stored.extents not in there
        )

    def meta(self) -> dict[str, Any]:
        return {
            key: value for key, value in self.content.items() if key not in ("model", "optimizer")
        }


def read(source: Path, options: ReadOptions = EVERYTHING) -> Checkpoint:
    """Read a checkpoint's headers. `metadata_from` is a config.json, or a folder with one, for a
    source without.

    Raises RefusedError for anything missing, damaged or contradictory, and for tensors that GPT-2
    has not."""
    files = find(source, options.iteration)
    ranks = [MerakRank.read(path, place) for place, path in sorted(files.models.items())]
    config, args = find_config(files.folder, options.metadata_from), args_of(ranks[0].content)
    layout = _layout(files)
    words = _Words.of(ranks, layout, config, args)
    dialect = (
        MERAK_CUT
        if any(cut in name for rank in ranks for name in rank.names for cut in _CUT_NAMES)
        else MERAK
    )
    _check_names(ranks, dialect)
    is_tied = any(rank.tied for rank in ranks) or said(config, args).get("tied") is not False
    naming = _Naming(
        NameResolver(
            dialect, layout, None, None, Sizes(vocab=words.true), gated=False, tied=is_tied
        ),
        words.whole,
    )
    states, groups, notes = ([], (), []) if options.weights_only else _optimizer(files, ranks)
    held = [naming.hold(found) for found in states]
    stepped = {one.canonical for one in held if one.found.state == MAIN_PARAM}
    for rank in ranks:
        model = [
            naming.hold(TensorEntry(name, rank.place, MAIN_PARAM, stored))
            for name, stored in rank.tensors()
        ]
        held += [
            in_state(one, MODEL_PARAM) if one.canonical in stepped else one for one in model
        ]  # the model's own copy
    index, iteration = Index(held, layout), files.iteration or _iteration(ranks[0].content)
    _check_complete(files.folder, index, dialect, said(config, args))
    return Checkpoint(
        "merak",
        files.folder,
        iteration,
        layout,
        index,
        bool(states),
        index.num_layers(),
        rank_folders={(rank.place.tp, rank.place.pp, 0): rank.path.parent for rank in ranks},
        rank_metadata={
            (rank.place.tp, rank.place.pp, 0): {**rank.meta(), "config": config} for rank in ranks
        },
        training_states={
            (rank.place.tp, rank.place.pp, 0): _training_state(rank, iteration, groups)
            for rank in ranks
        },
        dropped=sorted({name for rank in ranks for name in rank.buffers}),
        notes=notes,
    )


def _layout(files: MerakFiles) -> Layout:
    tp, pp = (
        1 + max(place.tp for place in files.models),
        1 + max(place.pp for place in files.models),
    )
    return Layout(tp=tp, pp=pp, etp=tp, dp=max(map(len, files.optimizers.values()), default=1))


def _iteration(content: dict[str, Any]) -> int:
    """The iteration of a folder whose name does not tell; 0 for the tools' files, which have
    none."""
    number = content.get("iteration")
    return number if isinstance(number, int) else 0


@dataclass(frozen=True, slots=True)
class _Words:
    """The vocabulary: its true size (None: nobody recorded it) and whether each rank holds the
    whole table."""

    true: int | None
    whole: bool

    @classmethod
    def of(
        cls, ranks: list[MerakRank], layout: Layout, config: dict[str, Any], args: dict[str, Any]
    ) -> _Words:
        """By the table's rows: as many as the model is built with are the whole table; else each
        rank has its share, as the tools write it, unless the run's arguments say otherwise."""
        found = [
            (rank, stored)
            for rank in ranks
            for name, stored in rank.tensors()
            if name.endswith(".wte.weight")
        ]
        if not found:
            raise RefusedError(
                f"{ranks[0].path.parent.parent}: no rank holds transformer.wte.weight; a stage is "
                "missing, or the model is no GPT-2"
            )
        rank, stored = found[0]
        rows, built = stored.shape[0], config.get("vocab_size")
        whole = layout.tp > 1 and (
            args.get("parallel_vocab") is False if built is None else rows == built
        )
        true, total = said(config, args).get("vocab"), rows * (1 if whole else layout.tp)
        if true is not None and true > total:
            raise RefusedError(
                f"{rank.path}: its table of words has {rows} rows, {total} on all ranks, and the "
                f"configuration says {true}; it is of another model"
            )
        return cls(true, whole)


@dataclass(frozen=True, slots=True)
class _Naming:
    """Holds tensors as `naming` says, but the vocabulary as a whole on each rank if
    `whole_words`."""

    naming: NameResolver
    whole_words: bool

    def hold(self, found: TensorEntry) -> StoredTensor:
        row = families.find(found.name, self.naming.dialect)
        if self.whole_words and row and row.arrangement == VOCAB:
            one = replace(self.naming, layout=replace(self.naming.layout, tp=1))
            return replace(one.hold(replace(found, place=replace(found.place, tp=0))), found=found)
        return self.naming.hold(found)


def _check_names(ranks: list[MerakRank], dialect: str) -> None:
    for rank in ranks:
        if unknown := sorted(name for name in rank.names if families.find(name, dialect) is None):
            raise RefusedError(
                f"{rank.path}: {len(unknown)} tensors are none of Merak's GPT-2: "
                f"{shorten_names(unknown)}"
            )


def _optimizer(
    files: MerakFiles, ranks: list[MerakRank]
) -> tuple[list[TensorEntry], tuple[ParamGroup, ...], list[str]]:
    """The optimizer's states, its parameter groups, and what is to be said of it."""
    if files.optimizers:
        parts = {rank.place: zero.Partitions(files.optimizers[rank.place]) for rank in ranks}
        found = [
            TensorEntry(rank.own_name(name), rank.place, state, stored)
            for rank in ranks
            for state, name, stored in parts[rank.place].parameters()
        ]
        return found, _groups(parts[ranks[0].place].base), []
    saved: list[Any] = [rank.content.get("optimizer") for rank in ranks]
    per_rank = [
        own
        for optimizer, rank in zip(saved, ranks, strict=True)
        if (own := zero.in_model_file(optimizer, {**rank.tied, **rank.names})) is not None
    ]
    if len(per_rank) < len(ranks):
        notes = [
            f"{files.folder}: its optimizer's state is of a kind that cannot be read; the weights "
            f"go alone"
        ]
        return [], (), notes if any(map(zero.has_state, saved)) else []
    found = [
        TensorEntry(rank.own_name(name), rank.place, state, stored)
        for rank, own in zip(ranks, per_rank, strict=True)
        for state, name, stored in own
    ]
    return found, _groups(saved[0]), []


def _groups(state: zero.AdamState) -> tuple[ParamGroup, ...]:
    step = zero.steps(state)
    taken = {} if step is None else {"step": step}
    return tuple(ParamGroup.of({**group, **taken}) for group in state["param_groups"])


def _training_state(
    rank: MerakRank, iteration: int, groups: tuple[ParamGroup, ...]
) -> TrainingState:
    return TrainingState(
        **said_by(args_of(rank.content)),
        iteration=iteration or None,
        groups=groups,
        steps=steps_of(groups),
        random_state=random_state_in(rank.content),
    )


def _check_complete(folder: Path, index: Index, dialect: str, known: dict[str, Any]) -> None:
    """Every tensor of GPT-2 must be there, whole, and the sizes must be those of the
    configuration."""
    layers = index.num_layers()
    if known.get("layers") not in (None, layers):
        raise RefusedError(
            f"{folder}: holds {layers} layers and not {known['layers']}, as the configuration "
            "says; a stage is missing, or the configuration is of another model"
        )
    expected = {
        name.format(i=i)
        for name in families.rows_of(dialect)
        if name != HEAD
        for i in range(layers)
    }
    if missing := sorted(expected - {held.canonical for held in index.held}):
        raise RefusedError(
            f"{folder}: lacks {len(missing)} tensors of GPT-2 of {layers} layers: "
            f"{shorten_names(missing)}; a stage is missing: copy the whole checkpoint"
        )
    index.check_complete()
    shapes = {tensor.name: tensor.shape for tensor in index.tensors(MAIN_PARAM)}
    there = {
        "hidden": shapes["final_norm.weight"][0],
        "ffn": shapes["layers.0.mlp.fc1.bias"][0],
        "positions": shapes["embedding.position.weight"][0],
    }
    for name, size in there.items():
        if known.get(name) not in (None, size):
            raise RefusedError(
                f"{folder}: has {name} {size} and not {known[name]}, as the configuration says; it "
                "is of another model"
            )
