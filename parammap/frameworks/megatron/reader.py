"""Megatron-LM checkpoints (torch format, distributed optimizer): folders, files, which rank holds
what.

Layout on disk: `<save>/latest_checkpointed_iteration.txt` and
`<save>/iter_NNNNNNN/mp_rank_TT[_PPP][_EEE]/{model_optim_rng.pt,distrib_optim.pt}` (Megatron-LM,
training/checkpointing.py, core_r0.6.0 … main).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parammap import families
from parammap.checkpoint import extra_states, owners
from parammap.checkpoint import sidecar as sidecars
from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.checkpoint.index import Index, NameResolver, StoredTensor, TensorEntry, in_state
from parammap.checkpoint.sidecar import Sidecar
from parammap.errors import RefusedError
from parammap.formats import torch_zip
from parammap.frameworks.megatron import before_core as megatron_before_core
from parammap.frameworks.megatron import optimizer as megatron_optimizer
from parammap.frameworks.megatron.facts import (
    Facts,
    args_of,
    experts_per_rank,
    global_layers,
    is_gated,
)
from parammap.frameworks.megatron.structure import specified
from parammap.frameworks.megatron.training_state import training_states
from parammap.name_list import shorten_names
from parammap.tensors.layout import AS_RECORDED, Layout, Numbering, Place
from parammap.tensors.logical import MAIN_PARAM, MODEL_PARAM, Stored

MODEL_FILE, OPTIMIZER_FILE, TRACKER = (
    "model_optim_rng.pt",
    "distrib_optim.pt",
    "latest_checkpointed_iteration.txt",
)
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?$")
#: the folder of a checkpoint without an iteration, and what the tracker then says
RELEASE = "release"
_ITERATION_FOLDER = re.compile(rf"iter_(\d{{7}})$|{RELEASE}$")


@dataclass(slots=True)
class Rank:
    """One rank's folder: where it stands, its model file's content (tensors as Stored), its
    optimizer file if any."""

    folder: Path
    place: Place
    content: dict[str, Any]

    @property
    def coordinates(self) -> Coordinates:
        return self.place.tp, self.place.pp, self.place.ep

    def chunks(self) -> dict[int, dict[str, Stored]]:
        """The model's tensors by chunk (virtual pipeline stage) and flat name."""
        return {
            chunk: dict(_flatten(self.content[key])) for chunk, key in enumerate(self._model_keys())
        }

    def meta(self) -> dict[str, Any]:
        """All but the model."""
        return {key: value for key, value in self.content.items() if key not in self._model_keys()}

    def structures(self) -> list[dict[str, Any]]:
        """Each chunk's state dict with a TensorSpec in place of each tensor."""
        return [specified(self.content[key], _dtype_and_shape) for key in self._model_keys()]

    def _model_keys(self) -> list[str]:
        keys = (
            ["model"]
            if "model" in self.content
            else sorted(
                (k for k in self.content if re.fullmatch(r"model\d+", str(k))),
                key=lambda k: int(k[5:]),
            )
        )
        if not keys:
            raise RefusedError(
                f"{self.folder / MODEL_FILE}: holds no model; is it a Megatron-LM checkpoint?"
            )
        return keys


def recognizes(source: Path) -> bool:
    return (source / TRACKER).is_file() or (
        source.is_dir() and any(map(_RANK_FOLDER.match, os.listdir(source)))
    )


def find_iteration(source: Path, iteration: int | None = None) -> tuple[Path, int]:
    """The iteration folder that SRC names, a save root or such a folder itself, and its number (0
    for `release`)."""
    if not source.is_dir():
        raise RefusedError(
            f"{source}: no such folder; name a save folder or one of its iter_NNNNNNN folders"
        )
    match = _ITERATION_FOLDER.match(source.name)
    if match or any(_RANK_FOLDER.match(path.name) for path in source.iterdir()):
        return source, int(match.group(1) or 0) if match else 0
    name = f"iter_{iteration:07d}" if iteration is not None else _tracked(source)
    if not (source / name).is_dir():
        raise RefusedError(
            f"{source / name}: no such folder; choose another iteration with --iteration"
        )
    return source / name, int(name[5:]) if name != RELEASE else 0


def _tracked(source: Path) -> str:
    tracker = source / TRACKER
    if not tracker.is_file():
        raise RefusedError(
            f"{source}: not a Megatron-LM checkpoint: it has neither {TRACKER} nor mp_rank_* "
            f"folders"
        )
    text = tracker.read_text().strip()
    if text != RELEASE and not text.isdigit():
        raise RefusedError(
            f"{tracker}: holds {text[:20]!r} and not an iteration; choose one with --iteration"
        )
    return text if text == RELEASE else f"iter_{int(text):07d}"


def read(
    source: Path,
    *,
    iteration: int | None = None,
    sidecar_folder: Path | None = None,
    weights_only: bool = False,
    drop: frozenset[str] = frozenset(),
    numbering: Numbering = AS_RECORDED,
) -> Checkpoint:
    """Read a checkpoint's headers and sidecar; its folders are numbered without dp and cp.

    Raises RefusedError for anything missing, damaged or contradictory.
    """
    folder, number = find_iteration(source, iteration)
    sidecar = None if weights_only else _recorded_sidecar(folder, number, sidecar_folder)
    ranks = _read_ranks(folder, sidecar)
    weights_only = weights_only or _is_release_of_weights(folder, ranks)
    if sidecar is None and not weights_only:
        made = None if sidecar_folder else megatron_before_core.sidecar_of(folder, ranks)
        sidecar = made or find_sidecar(folder, number, sidecar_folder)
    facts = Facts.of(sidecar, ranks[0].content)
    layout = facts.layout(_found_sizes(ranks))
    _check_grid(folder, ranks, layout)
    owners.check(
        folder,
        [
            owners.Owned(
                rank.folder / MODEL_FILE,
                args.get("rank"),
                owners.fits(layout, args, *rank.coordinates),
                str(rank.place),
            )
            for rank in ranks
            for args in [args_of(rank.content)]
        ],
    )
    by_rank = [list(_model_tensors(rank, MODEL_PARAM)) for rank in ranks]
    found = [one for own in by_rank for one in own]
    kept = [one for one in found if not megatron_optimizer.dropped(one.name, drop)]
    states = (
        []
        if weights_only or sidecar is None
        else [
            state
            for rank, own in zip(ranks, by_rank, strict=True)
            for state in megatron_optimizer.read_rank(rank.folder, rank.place, own, sidecar, drop)
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


def _is_release_of_weights(folder: Path, ranks: list[Rank]) -> bool:
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


def _read_ranks(folder: Path, sidecar: Sidecar | None) -> list[Rank]:
    matches = {
        path: match for path in sorted(folder.iterdir()) if (match := _RANK_FOLDER.match(path.name))
    }
    if not matches:
        raise RefusedError(
            f"{folder}: has no mp_rank_* folder; is it saved in Megatron-LM's torch format?"
        )
    contents = {path: _content(path / MODEL_FILE) for path in matches}
    second_is_ep = _second_number_is_ep(contents, sidecar)
    ranks = []
    for path, match in matches.items():
        tp, second, third = (int(number or 0) for number in match.groups())
        place = Place(tp, 0, second) if second_is_ep else Place(tp, second, third)
        ranks.append(Rank(path, place, contents[path]))
    return ranks


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RefusedError(f"{path}: missing; copy the whole checkpoint")
    content = torch_zip.read(path)
    if not isinstance(content, dict):
        raise RefusedError(f"{path}: holds a {type(content).__name__} and not a checkpoint")
    return content


def _second_number_is_ep(contents: dict[Path, dict[str, Any]], sidecar: Sidecar | None) -> bool:
    """mp_rank_TT_NNN: NNN is the pipeline stage if there are several, else the expert rank; the
    sizes tell."""
    layout = sidecar.any_layout() if sidecar else None
    if layout:
        sizes: dict[str, int] = layout["parallel"]
        return sizes["pp"] == 1 and sizes["ep"] > 1
    args = args_of(next(iter(contents.values())))
    if args:
        return (args.get("pipeline_model_parallel_size") or 1) == 1
    first_stages = [
        path
        for path, content in contents.items()
        if any("word_embeddings" in n for n, _ in _flatten(content.get("model", {})))
    ]
    return len(first_stages) == len(contents)


def _found_sizes(ranks: list[Rank]) -> dict[str, int]:
    return {
        "tp": 1 + max(r.place.tp for r in ranks),
        "pp": 1 + max(r.place.pp for r in ranks),
        "ep": 1 + max(r.place.ep for r in ranks),
        "vpp": max(len(r.chunks()) for r in ranks),
    }


def _check_grid(folder: Path, ranks: list[Rank], layout: Layout) -> None:
    """Every rank of the grid must be there, with all its chunks, and no other."""
    if layout.ep > 1 and layout.etp != layout.tp:
        raise RefusedError(
            f"{folder}: expert tensor parallel {layout.etp} differs from tp {layout.tp}; "
            "such checkpoints cannot be converted yet"
        )
    expected = {
        Place(t, p, e) for t in range(layout.tp) for p in range(layout.pp) for e in range(layout.ep)
    }
    there = {rank.place for rank in ranks}
    if expected != there:
        missing, extra = sorted(expected - there), sorted(there - expected)
        what = f"rank {missing[0]} is missing" if missing else f"rank {extra[0]} should not exist"
        raise RefusedError(
            f"{folder}: {what} in a checkpoint of {layout}; copy the whole checkpoint"
        )
    for rank in ranks:
        if len(rank.chunks()) != layout.vpp:
            raise RefusedError(
                f"{rank.folder / MODEL_FILE}: holds {len(rank.chunks())} model chunks and not "
                f"{layout.vpp}"
            )


def read_model(folder: Path, place: Place) -> tuple[Rank, list[TensorEntry]]:
    """A rank's model file, and its tensors, chunk by chunk."""
    rank = Rank(folder, place, _content(folder / MODEL_FILE))
    return rank, list(_model_tensors(rank, MODEL_PARAM))


def _model_tensors(rank: Rank, state: str) -> Iterator[TensorEntry]:
    for chunk, tensors in rank.chunks().items():
        place = Place(rank.place.tp, rank.place.pp, rank.place.ep, chunk)
        for name, stored in tensors.items():
            yield TensorEntry(name, place, state, stored)


def _naming(
    ranks: list[Rank], layout: Layout, sidecar: Sidecar | None, facts: Facts
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
    ranks: list[Rank], sidecar: Sidecar | None
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


def _flatten(tree: object, prefix: str = "") -> Iterator[tuple[str, Stored]]:
    """(dotted name, Stored) of every tensor in nested dicts; `_extra_state` and other leaves are no
    tensors."""
    if extra_states.is_one(prefix):
        return
    if isinstance(tree, Stored):
        yield prefix, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))


def _dtype_and_shape(leaf: object) -> tuple[str, tuple[int, ...]] | None:
    return (leaf.dtype, leaf.shape) if isinstance(leaf, Stored) else None
