"""Megatron-LM checkpoints (torch format, distributed optimizer): what the files of all ranks hold
together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from parammap import families
from parammap.checkpoint import owners
from parammap.checkpoint import sidecar as sidecars
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import Index, NameResolver, StoredTensor, TensorEntry, in_state
from parammap.checkpoint.sidecar import Sidecar
from parammap.checkpoint.trackers import RELEASE
from parammap.errors import RefusedError
from parammap.frameworks.framework import EVERYTHING, ReadOptions
from parammap.frameworks.megatron import before_core
from parammap.frameworks.megatron import optimizer as megatron_optimizer
from parammap.frameworks.megatron.facts import (
    Facts,
    args_of,
    experts_per_rank,
    global_layers,
    is_gated,
)
from parammap.frameworks.megatron.files import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    MegatronRank,
    find_iteration,
    read_ranks,
)
from parammap.frameworks.megatron.training_state import training_states
from parammap.tensors import grid
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import MAIN_PARAM
from parammap.tensors.names import shorten_names


def read(source: Path, options: ReadOptions = EVERYTHING) -> Checkpoint:
    """Read a checkpoint's headers and sidecar; its folders are numbered without dp and cp.

    Raises RefusedError for anything missing, damaged or contradictory.
    """
    folder, number = find_iteration(source, options.iteration)
    weights_only = options.weights_only
    sidecar = None if weights_only else _recorded_sidecar(folder, number, options.sidecar_folder)
    ranks = read_ranks(folder, sidecar)
    weights_only = weights_only or _is_release_of_weights(folder, ranks)
    if sidecar is None and not weights_only:
        made = None if options.sidecar_folder else before_core.sidecar_of(folder, ranks)
        sidecar = made or find_sidecar(folder, number, options.sidecar_folder)
    facts = Facts.of(sidecar, ranks[0].content)
    layout = facts.layout(_found_sizes(ranks))
    _check_grid(folder, ranks, layout)
    owned = ((rank.folder / MODEL_FILE, args_of(rank.content), rank.place) for rank in ranks)
    owners.check_ranks(folder, layout, owned)
    by_rank = [rank.tensors() for rank in ranks]
    found = [one for own in by_rank for one in own]
    kept = [one for one in found if not megatron_optimizer.dropped(one.name, options.drop)]
    states = (
        []
        if weights_only or sidecar is None
        else [
            state
            for rank, own in zip(ranks, by_rank, strict=True)
            for state in megatron_optimizer.read_rank(
                rank.folder, rank.place, own, sidecar, options.drop
            )
        ]
    )
    naming = _naming(ranks, layout, sidecar, facts)
    index = Index(
        _with_weights(
            [naming.hold(one) for one in states],
            [naming.hold(one) for one in _with_facts(kept, states)],
            sidecar,
        ),
        layout,
    )
    index.check_complete()
    metadata = {rank.coordinates: rank.meta() for rank in ranks}
    return Checkpoint(
        "megatron",
        folder,
        number,
        layout,
        index,
        not weights_only,
        facts.num_layers() or index.num_layers(),
        rank_folders={rank.coordinates: rank.folder for rank in ranks},
        rank_metadata=metadata,
        training_states=training_states(metadata),
        structures={rank.coordinates: rank.structures() for rank in ranks},
        sidecar=sidecar,
        dropped=sorted({one.name for one in found} - {one.name for one in kept}),
    )


def _is_release_of_weights(folder: Path, ranks: list[MegatronRank]) -> bool:
    """Whether it is one that Megatron-LM loads without asking for an optimizer's state, and has
    none."""
    return folder.name == RELEASE and not any(
        (rank.folder / OPTIMIZER_FILE).is_file() or rank.content.get("optimizer") for rank in ranks
    )


def has_undistributed_optimizer(checkpoint: Checkpoint) -> bool:
    """Whether the model files hold the main params of an optimizer that is not a distributed
    one."""
    return any(
        "fp32_from_fp16_params" in (metadata.get("optimizer") or ())
        for metadata in checkpoint.rank_metadata.values()
    )


def _with_facts(model: list[TensorEntry], states: list[TensorEntry]) -> list[TensorEntry]:
    """The model's tensors with what the sidecar says, with their optimizer state, of how they are
    cut."""
    known = {
        (state.place.tp, state.place.pp, state.place.vpp, state.name): state for state in states
    }
    there = [known.get((one.place.tp, one.place.pp, one.place.vpp, one.name), one) for one in model]
    return [replace(one, partition=said.partition) for one, said in zip(model, there, strict=True)]


def _with_weights(
    states: list[StoredTensor], model: list[StoredTensor], sidecar: Sidecar | None
) -> list[StoredTensor]:
    """All tensors, where one that no optimizer steps (frozen, or a buffer) has the model's own copy
    as its weight.

    A bare map names dense parameters only, so there a tensor without a state is one the map is
    missing: refused."""
    stepped = {held.canonical for held in states if held.found.state == MAIN_PARAM}
    missing = sorted({held.found.name for held in model if held.canonical not in stepped})
    if missing and sidecar is not None and not sidecar.complete:
        raise RefusedError(
            f"{sidecar.folder}: the map does not say where the optimizer state of these "
            f"{len(missing)} "
            f"tensors lies: {shorten_names(missing)}; train with ParamMap's hook, or leave experts "
            f"out with "
            "--drop experts, or convert --weights-only"
        )
    own = [in_state(held, MAIN_PARAM) for held in model if held.canonical not in stepped]
    return states + own + [held for held in model if held.canonical in stepped]


def find_sidecar(folder: Path, iteration: int, given: Path | None) -> Sidecar:
    """The sidecar: in the folder given, in the iteration's own folder, or the latest one in the
    save root."""
    if found := _recorded_sidecar(folder, iteration, given):
        return found
    raise RefusedError(
        f"{given or folder / 'param_map'}: no param_map*.json or layout_*.json here, so nobody "
        f"knows what "
        f"lies where in {OPTIMIZER_FILE}; name their folder with --sidecar, or convert "
        f"--weights-only"
    )


def _recorded_sidecar(folder: Path, iteration: int, given: Path | None) -> Sidecar | None:
    for candidate in [given] if given else [folder / "param_map", folder.parent / "param_map"]:
        found = sidecars.read(candidate)
        if found is None:
            continue
        if found.iteration not in (None, iteration) and iteration:
            raise RefusedError(
                f"{found.folder}: written at iteration {found.iteration}, the checkpoint is of "
                f"{iteration}; name the right folder with --sidecar, or convert --weights-only"
            )
        return found
    return None


def _found_sizes(ranks: list[MegatronRank]) -> dict[str, int]:
    return {
        "tp": 1 + max(r.place.tp for r in ranks),
        "pp": 1 + max(r.place.pp for r in ranks),
        "ep": 1 + max(r.place.ep for r in ranks),
        "vpp": max(len(r.chunks()) for r in ranks),
    }


def _check_grid(folder: Path, ranks: list[MegatronRank], layout: Layout) -> None:
    """Every rank of the grid must be there, with all its chunks, and no other."""
    if layout.ep > 1 and layout.etp != layout.tp:
        raise RefusedError(
            f"{folder}: expert tensor parallel {layout.etp} differs from tp {layout.tp}; "
            "such checkpoints cannot be converted yet"
        )
    sides = range(layout.tp), range(layout.pp), range(layout.ep)
    there = {rank.coordinates for rank in ranks}
    what = ""
    if missing := grid.missing(there, sides):
        what = f"rank {Place(*missing[1])} is missing"
    elif extra := grid.extra(there, sides):
        what = f"rank {Place(*extra)} should not exist"
    if what:
        raise RefusedError(
            f"{folder}: {what} in a checkpoint of {layout}; copy the whole checkpoint"
        )
    for rank in ranks:
        if len(rank.chunks()) != layout.vpp:
            raise RefusedError(
                f"{rank.folder / MODEL_FILE}: holds {len(rank.chunks())} model chunks and not "
                f"{layout.vpp}"
            )


def _naming(
    ranks: list[MegatronRank], layout: Layout, sidecar: Sidecar | None, facts: Facts
) -> NameResolver:
    chunks = [chunk for rank in ranks for chunk in rank.chunks().values()]
    names = [name for chunk in chunks for name in chunk]
    dialect = families.dialect_of(names)
    shapes = [{name: stored.shape for name, stored in chunk.items()} for chunk in chunks]
    return NameResolver(
        dialect,
        layout,
        _global_layers(ranks, sidecar),
        experts_per_rank(names),
        facts.sizes(),
        is_gated(shapes, dialect),
        facts.tied(),
    )


def _global_layers(
    ranks: list[MegatronRank], sidecar: Sidecar | None
) -> dict[tuple[int, int], dict[str, list[int]]]:
    """Global layer numbers of each stage's chunk, counted from the model files, and checked against
    the sidecar."""
    layers = global_layers(
        ((rank.place.pp, chunk), tensors)
        for rank in ranks
        for chunk, tensors in rank.chunks().items()
    )
    _check_layers(layers, sidecar)
    return layers


def _check_layers(
    layers: dict[tuple[int, int], dict[str, list[int]]], sidecar: Sidecar | None
) -> None:
    if sidecar is None:
        return
    for (_, pp, _), rank in sidecar.ranks.items():
        for chunk in rank.layout["chunks"] if rank.layout else []:
            for prefix, numbers in chunk["layers"].items():
                counted = layers.get((pp, chunk["vpp"]), {}).get(prefix, [])
                if numbers != counted:
                    raise RefusedError(
                        f"{sidecar.folder}: stage {pp} chunk {chunk['vpp']} holds {prefix} "
                        f"{numbers} by "
                        f"the sidecar, {counted} by the model files; they are of different runs"
                    )
