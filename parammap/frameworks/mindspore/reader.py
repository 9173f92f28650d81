"""Reading MindSpore checkpoints: our own output, MindSpeed-Core-MS's saves, and what the existing
converter wrote.

`rank_N/*.ckpt|*.safetensors` (the newest file of each folder) and `pt_meta/`, which has the sidecar
and the arguments of the Megatron-LM run that it came from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from parammap import families
from parammap.checkpoint import owners
from parammap.checkpoint import sidecar as sidecars
from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.checkpoint.cuts import UNRECORDED, Partition
from parammap.checkpoint.index import Index, NameResolver, TensorEntry
from parammap.checkpoint.sidecar import Sidecar
from parammap.errors import RefusedError
from parammap.formats import torch_zip, tree_schema
from parammap.formats.scalars import value_of
from parammap.formats.tree_schema import count, dict_of, kind, list_of, optional, record
from parammap.frameworks.framework import EVERYTHING, ReadOptions
from parammap.frameworks.megatron.facts import Facts, args_of, experts_per_rank, is_gated
from parammap.frameworks.megatron.saved import METADATA
from parammap.frameworks.megatron.structure import megatron_naming, specified, structures_of
from parammap.frameworks.megatron.training_state import training_states
from parammap.frameworks.mindspore import scalars as mindspore_scalars
from parammap.frameworks.mindspore import sharded as mindspore_sharded
from parammap.frameworks.mindspore.formats import BY_SUFFIX
from parammap.frameworks.mindspore.target import STRUCTURE_KEY
from parammap.tensors import grid
from parammap.tensors.layout import Layout, Numbering, Place
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, ITEMSIZE, MAIN_PARAM, Stored
from parammap.tensors.names import shorten_names

_RANK_FOLDER = re.compile(r"rank_(\d+)$")
_ARGS_FILE = re.compile(r"args_tp(\d+)_pp(\d+)(?:_ep(\d+))?\.pt$")
_STATES = (EXP_AVG, EXP_AVG_SQ)


def _metadata(path: Path) -> dict[str, Any]:
    content = torch_zip.read(path)
    tree_schema.check(content, METADATA, path)
    tree_schema.check(content, _STRUCTURES, path)
    return dict(content)


def _structure(value: Any, where: str) -> Iterator[str]:
    """A state dict with ("tensor", dtype, shape) for each tensor."""
    if isinstance(value, dict):
        yield from dict_of(kind(str), _structure)(value, where)
    elif isinstance(value, tuple) and value[:1] == ("tensor",):
        if len(value) != 3 or not isinstance(value[1], str) or value[1] not in ITEMSIZE:
            yield f"{where} describes no tensor by dtype and shape"
        else:
            yield from list_of(count)(value[2], where)


_STRUCTURES = record({STRUCTURE_KEY: optional(list_of(_structure))})


def recognizes(source: Path) -> bool:
    return source.is_dir() and any(map(_RANK_FOLDER.match, os.listdir(source)))


def read(source: Path, options: ReadOptions = EVERYTHING) -> Checkpoint:
    """Read a MindSpore checkpoint. `numbering` overrules what pt_meta says of dp and cp, which
    number the rank folders.

    Raises RefusedError for anything missing, damaged or contradictory.
    """
    meta_folder = options.sidecar_folder or source / "pt_meta"
    sidecar, meta_files = sidecars.read(meta_folder), _meta_files(meta_folder)
    rank_metadata = {rank: _metadata(path) for rank, path in meta_files.items()}
    if sidecar is None and not rank_metadata:
        raise RefusedError(
            f"{meta_folder}: has no layout_*.json, param_map*.json or args_*.pt, so nobody knows "
            "the parallel sizes; name their folder with --sidecar"
        )
    facts = Facts.of(sidecar, next(iter(rank_metadata.values()), {}))
    layout = facts.layout({})
    metas = rank_metadata.items()
    owned = ((meta_files[rank], args_of(meta), Place(*rank)) for rank, meta in metas)
    owners.check_ranks(source, layout, owned)
    folders = _rank_folders(source, layout, options.numbering)
    contents = {
        rank: _without_noop(*_content(folder, options.numbering.suffix), options.numbering.noop)
        for rank, folder in folders.items()
    }
    naming = _naming({rank: tensors for rank, (tensors, _) in contents.items()}, layout, facts)
    partitions = _partitions(sidecar)
    found = [
        one
        for rank, (tensors, _) in contents.items()
        for one in _found(rank, tensors, partitions, options.weights_only)
    ]
    index = Index([naming.hold(one) for one in found], layout)
    index.check_complete()
    updated = {
        rank: mindspore_scalars.updated(rank_metadata.get(rank, {}), scalars)
        for rank, (_, scalars) in contents.items()
    }
    checkpoint = Checkpoint(
        "mindspore",
        source,
        max(meta.get("iteration") or 0 for meta in updated.values()),
        layout,
        index,
        with_optimizer=EXP_AVG in index.states(),
        num_layers=facts.num_layers() or index.num_layers(),
        rank_folders=folders,
        rank_metadata=updated,
        training_states=training_states(updated),
        structures={
            rank: [specified(tree, _dtype_and_shape) for tree in meta.get(STRUCTURE_KEY) or []]
            for rank, meta in rank_metadata.items()
        },
        sidecar=sidecar,
    )
    if sidecar and checkpoint.with_optimizer:
        _check_states(checkpoint, sidecar, meta_folder)
    return checkpoint


def _check_states(source: Checkpoint, sidecar: Sidecar, meta_folder: Path) -> None:
    """Refuse a sidecar that describes other parameters of a rank than those whose moments its file
    holds."""
    naming = megatron_naming(source, structures_of(source))
    tables = {families.WORD_EMBEDDING} | ({families.HEAD} if naming.tied is None else set())
    for rank, folder in source.rank_folders.items():
        place = Place(*rank)
        there = {
            held.canonical
            for held in source.index.held
            if held.found.state == EXP_AVG and held.found.place == place
        }
        said = {
            naming.canonical(
                TensorEntry(
                    slot.name,
                    replace(place, vpp=chunk),
                    EXP_AVG,
                    Stored(slot.dtype, slot.shape, ()),
                )
            )
            for chunk, slot in sidecar.slots(rank)
        }
        if lacking := sorted(there - said - tables):
            raise RefusedError(
                f"{meta_folder}: its sidecar does not name {shorten_names(lacking)} of {place}, "
                f"whose moments "
                f"{folder.name} holds; take the sidecar that was written with this checkpoint"
            )
        if lacking := sorted(said - there - tables):
            raise RefusedError(
                f"{folder}: has no moments of {shorten_names(lacking)}, which the sidecar in "
                f"{meta_folder} names; copy the whole checkpoint, or convert --weights-only"
            )


def _meta_files(folder: Path) -> dict[Coordinates, Path]:
    files = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := _ARGS_FILE.match(path.name):
            tp, pp, ep = (int(number or 0) for number in match.groups())
            files[tp, pp, ep] = path
    return files


def _rank_folders(source: Path, layout: Layout, numbering: Numbering) -> dict[Coordinates, Path]:
    """The folder of each (tp, pp, ep): the lowest rank that holds it, in the order
    tp-cp-ep-dp-pp."""
    numbers = sorted(
        int(match.group(1)) for name in os.listdir(source) if (match := _RANK_FOLDER.match(name))
    )
    if not numbers:
        raise RefusedError(f"{source}: has no rank_N folder; copy the whole checkpoint")
    dp, cp = numbering.dp or layout.dp, numbering.cp or layout.cp
    stage = dp * cp * layout.tp
    if not (numbering.dp or numbering.cp) and (layout.pp - 1) * stage not in numbers:
        stage = _stage_size(source, numbers, layout)
    first = mindspore_sharded.strategy_files(source / mindspore_sharded.STRATEGY_FOLDER)
    is_sharded = len(first) == layout.pp * layout.ep * layout.tp
    folders: dict[Coordinates, Path] = {}
    for pp, ep, tp in grid.cells([range(layout.pp), range(layout.ep), range(layout.tp)]):
        number = pp * stage + ep * cp * layout.tp + tp
        folder = source / f"rank_{list(first)[len(folders)] if is_sharded else number}"
        if not folder.is_dir():
            raise RefusedError(
                f"{folder}: missing; it should hold {Place(tp, pp, ep)} of {layout}: copy the "
                "whole checkpoint"
            )
        folders[tp, pp, ep] = folder
    return folders


def _stage_size(source: Path, numbers: list[int], layout: Layout) -> int:
    """Ranks per pipeline stage, from the highest folder: the files were numbered for another dp
    than the sidecar's."""
    last = numbers[-1] - numbers[-1] % layout.tp
    size, rest = divmod(last, max(layout.pp - 1, 1))
    if rest or size % layout.tp:
        raise RefusedError(
            f"{source}: rank folders up to {numbers[-1]} do not fit {layout}; a folder is missing"
        )
    return size


def _content(folder: Path, suffix: str | None) -> tuple[dict[str, Stored], dict[str, float]]:
    """The tensors and the scalars of the newest file in a rank's folder."""
    wanted = [suffix] if suffix else list(BY_SUFFIX)
    files = [path for path in folder.iterdir() if path.suffix in wanted]
    if not files:
        raise RefusedError(
            f"{folder}: has no {' or '.join(wanted)} file; copy the whole checkpoint"
        )
    newest = mindspore_sharded.newest(files)
    entries = {
        name: stored
        for name, stored in BY_SUFFIX[newest.suffix].entries(newest).items()
        if isinstance(stored, Stored)
    }
    entries = mindspore_sharded.whole(newest, entries)
    tensors = {name: stored for name, stored in entries.items() if "." in name}
    scalars = {
        name: value_of(stored)
        for name, stored in entries.items()
        if "." not in name and stored.numel == 1
    }
    if not tensors:
        raise RefusedError(f"{newest}: holds no tensor of a model")
    return tensors, scalars


def _without_noop(
    tensors: dict[str, Stored], scalars: dict[str, float], noop: frozenset[int]
) -> tuple[dict[str, Stored], dict[str, float]]:
    """The tensors of the layers that do something, these numbered through."""
    kept = {}
    for name, stored in tensors.items():
        layer = families.layer_of(name)
        if layer is None or layer[1] not in noop:
            number = layer and layer[1] - sum(other < layer[1] for other in noop)
            kept[families.renumber(name, number, None)] = stored
    return kept, scalars


def _role_and_name(name: str) -> tuple[str, str]:
    prefix, _, rest = name.partition(".")
    return (prefix, rest) if prefix in _STATES else (MAIN_PARAM, name)


def _naming(
    contents: dict[Coordinates, dict[str, Stored]], layout: Layout, facts: Facts
) -> NameResolver:
    names = [_role_and_name(name)[1] for tensors in contents.values() for name in tensors]
    dialect = families.dialect_of(names)
    shapes = [
        {name: stored.shape for name, stored in tensors.items()} for tensors in contents.values()
    ]
    return NameResolver(
        dialect,
        layout,
        None,
        experts_per_rank(names),
        facts.sizes(),
        is_gated(shapes, dialect),
        facts.tied(),
    )


def _partitions(sidecar: Sidecar | None) -> dict[tuple[int, int, str], Partition]:
    """What the sidecar says of how tensors are cut, by tensor and pipeline rank and Megatron's name
    under global numbers."""
    known = {}
    for (tp, pp, _), rank in sidecar.ranks.items() if sidecar else ():
        layers = (
            {chunk["vpp"]: chunk["layers"] for chunk in rank.layout["chunks"]}
            if rank.layout
            else {}
        )
        for buffer in (buffer for buffers in rank.optimizers for buffer in buffers or ()):
            for slot in buffer.slots:
                path, local = families.layer_of(slot.name) or (None, None)
                numbers = layers.get(buffer.chunk, {}).get(path)
                known[
                    tp, pp, families.renumber(slot.name, numbers[local] if numbers else None, None)
                ] = slot.partition
    return known


def _found(
    rank: Coordinates,
    tensors: dict[str, Stored],
    partitions: dict[tuple[int, int, str], Partition],
    weights_only: bool,
) -> Iterator[TensorEntry]:
    tp, pp, ep = rank
    for full_name, stored in tensors.items():
        state, name = _role_and_name(full_name)
        if state == MAIN_PARAM or not weights_only:
            yield TensorEntry(
                name, Place(tp, pp, ep), state, stored, partitions.get((tp, pp, name), UNRECORDED)
            )


def _dtype_and_shape(leaf: object) -> tuple[str, tuple[int, ...]] | None:
    """Of a tensor as pt_meta describes it: ("tensor", dtype, shape)."""
    return (
        (leaf[1], tuple(leaf[2])) if isinstance(leaf, tuple) and leaf[:1] == ("tensor",) else None
    )
