"""Reading metaseq checkpoints (OPT): model-parallel parts × FSDP shards, resharded files, whole
parts and singletons.

Each file is torch.save's with `cfg`, `model`, `extra_state`, `optimizer_history`,
`last_optimizer_state`, `shard_metadata` … (metaseq, trainer.py, main f7ffa5f and 809e49c). A part
is a tensor-parallel rank; shards are no rank of the model's. The weights that the optimizer steps
are the model's own: there is no copy of them in more precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parammap import families
from parammap.checkpoint import owners
from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.checkpoint.cuts import UNRECORDED, Partition
from parammap.checkpoint.index import Index, NameResolver, StoredTensor, TensorEntry
from parammap.checkpoint.training_state import ParamGroup, TrainingState, as_number, steps_of
from parammap.errors import RefusedError
from parammap.frameworks.framework import EVERYTHING, ReadOptions
from parammap.frameworks.megatron.optimizer import dropped as is_dropped
from parammap.frameworks.metaseq.files import MetaseqFiles, find, recognizes
from parammap.frameworks.metaseq.metadata import OUTPUT, borrowed, join
from parammap.frameworks.metaseq.norms import without_copies
from parammap.frameworks.metaseq.parts import ModelPart, read_part
from parammap.frameworks.metaseq.shard import Save, ShardFile, fields_of, value_of
from parammap.tensors.arrangement import Sizes
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import MAIN_PARAM, Stored
from parammap.tensors.names import shorten_names

__all__ = ["DIALECT", "naming_of", "read", "recognizes"]

DIALECT = families.METASEQ


def read(source: Path, options: ReadOptions = EVERYTHING) -> Checkpoint:
    """Read a checkpoint's headers and metadata. SRC is a folder with one checkpoint, a prefix of
    its files, a pattern of them, or a file (see metaseq_files.find). `metadata_from` is what flat
    files without metadata were made from; `ema` takes the moving average of the weights.

    `rank_metadata` holds per part the first shard's file without its model, with its `shard_metadata`
    wherever that was found, and `optimizer_index`: the key of the flat parameter that each number
    of the optimizer's states stands for. Raises RefusedError for anything missing, damaged or
    contradictory."""
    files = find(source, options.iteration)
    described, count = options.metadata_from, len(files.parts)
    lent = borrowed(described, count) if described else [None] * count
    parts = [
        read_part(number, paths, options.sidecar_folder, lent[number], options.ema)
        for number, paths in enumerate(files.parts)
    ]
    _check_ranks(files, parts)
    found: list[TensorEntry] = []
    rank_metadata: dict[Coordinates, dict[str, Any]] = {}
    training_states: dict[Coordinates, TrainingState] = {}
    saves: list[Save] = []
    left_out: list[str] = []
    for number, part in enumerate(parts):
        saves.append(part.first.save)
        saves[0].check_same(saves[-1])
        by_state, numbers, copies = _tensors(part, options.weights_only or options.ema)
        found += _found(part, by_state)
        rank_metadata[number, 0, 0] = _meta(part, by_state[MAIN_PARAM], numbers)
        training_states[number, 0, 0] = _training_state(part)
        left_out += copies
    layout = Layout(tp=len(files.parts), etp=len(files.parts), dp=len(files.parts[0]))
    naming = _naming(layout, rank_metadata)
    held = [naming.hold(one) for one in found if not is_dropped(one.name, options.drop)]
    if not files.is_part_alone:
        _check_parts(held, layout)
    index = Index(held, layout)
    index.check_complete()
    notes = (
        [
            f"{len(left_out)} copies of norms that no part trains are left out "
            f"({shorten_names(left_out)})"
        ]
        if left_out
        else []
    )
    return Checkpoint(
        "metaseq",
        files.folder,
        saves[0].num_updates or 0,
        layout,
        index,
        len(index.states()) > 1,
        index.num_layers(),
        rank_folders=dict.fromkeys(rank_metadata, files.folder),
        rank_metadata=rank_metadata,
        training_states=training_states,
        notes=notes,
        dropped=sorted(
            {*left_out, *(one.name for one in found if is_dropped(one.name, options.drop))}
        ),
    )


def _check_ranks(files: MetaseqFiles, parts: list[ModelPart]) -> None:
    """Refuse files that lie where another rank's should. Rank r of a training is shard r // parts
    of part r % parts; a tool that cuts each part anew leaves the number of the part's first shard
    in all of its shards."""
    are_cut_anew = all(len({shard.rank for shard in part.shards}) == 1 for part in parts)

    def owned(part: ModelPart, number: int, shard: ShardFile) -> owners.Owned:
        def fits(rank: int) -> bool:
            if shard.parts is None or not (files.is_part_alone or shard.parts == len(parts)):
                return True
            return (files.is_part_alone or rank % shard.parts == part.number) and (
                are_cut_anew or rank // shard.parts == number
            )

        return owners.Owned(shard.path, shard.rank, fits, f"shard {number} of part {part.number}")

    owners.check(
        files.folder,
        [owned(part, number, shard) for part in parts for number, shard in enumerate(part.shards)],
    )


def naming_of(source: Checkpoint) -> NameResolver:
    """What turns a metaseq checkpoint's names into canonical ones."""
    return _naming(source.layout, source.rank_metadata)


def _naming(layout: Layout, rank_metadata: dict[Coordinates, dict[str, Any]]) -> NameResolver:
    meta = next(iter(rank_metadata.values()))
    heads = setting(meta, "decoder_attention_heads")
    shared = [
        (meta.get("shard_metadata") or {}).get("param_metadata", ())
        for meta in rank_metadata.values()
    ]
    tied = any(
        join(entry["fsdp_path"], other) == OUTPUT
        for entries in shared
        for entry in entries
        for _, other in entry.get("shared_param_info", ())
    )
    tied = tied or setting(meta, "share_decoder_input_output_embed")
    return NameResolver(DIALECT, layout, None, None, Sizes(heads, heads), gated=False, tied=tied)


def _check_parts(held: list[StoredTensor], layout: Layout) -> None:
    """Refuse if the first layer's output projection, [hidden, hidden / parts], says that there are
    more or fewer parts."""
    projection = next(
        (one.found for one in held if one.canonical == "layers.0.attention.out.weight"), None
    )
    if projection is None:
        return
    rows, cols = projection.stored.shape
    if cols * layout.tp != rows:
        raise RefusedError(
            f"{projection.where}: {projection.name} is {[rows, cols]}, of which {layout.tp} parts "
            f"do not make {[rows, rows]}; copy the whole checkpoint"
        )


def _tensors(
    part: ModelPart, weights_only: bool
) -> tuple[dict[str, dict[str, Stored]], dict[int, str], list[str]]:
    """A part's tensors by state and name, the optimizer's index, and the names left out."""
    weights = part.weights()
    moments, index = ({}, {}) if weights_only else part.moments(weights)
    by_state, left_out = without_copies(part.number, {MAIN_PARAM: weights, **moments})
    return by_state, index, left_out


def _found(part: ModelPart, by_state: dict[str, dict[str, Stored]]) -> Iterator[TensorEntry]:
    buffers = part.metadata.buffers if part.metadata else ()
    for state, tensors in by_state.items():
        for name, stored in tensors.items():
            yield TensorEntry(
                name,
                Place(part.number),
                state,
                stored,
                Partition(dim=-1) if name in buffers else UNRECORDED,
            )


# -----------------------------------------------------------------------------------------------------
# what is no tensor


def _meta(part: ModelPart, weights: dict[str, Stored], index: dict[int, str]) -> dict[str, Any]:
    meta = {**part.first.rest, "optimizer_index": index}
    if part.metadata:
        meta["shard_metadata"] = _current(part.metadata.raw, weights)
    return meta


def _training_state(part: ModelPart) -> TrainingState:
    saved = part.first.rest.get("last_optimizer_state") or {}
    history = part.first.rest.get("optimizer_history") or [{}]
    states = (saved.get("state") or {}).values()
    counted = {
        number
        for state in states
        if isinstance(state, dict) and (number := as_number(state.get("step"))) is not None
    }
    groups = tuple(map(ParamGroup.of, saved.get("param_groups", ())))
    return TrainingState(
        iteration=part.first.num_updates,
        groups=groups,
        steps=tuple(sorted(counted.union(steps_of(groups)))),
        loss_scale=as_number(saved.get("loss_scale")),
        optimizer=history[-1].get("optimizer_name"),
        random_state=(part.first.rest.get("extra_state") or {}).get("rng_tracker_states"),
    )


def _current(raw: dict[str, Any], weights: dict[str, Stored]) -> dict[str, Any] | None:
    """Shard metadata with the shapes that the tensors have: a tool left behind those of another
    number of parts (metaseq, scripts/reshard_mp.py). None if it names tensors that are not
    there."""
    entries = []
    for entry in raw["param_metadata"]:
        params = {}
        for key, param in entry["params"].items():
            names = [join(entry["fsdp_path"], name) for name in param["names"]]
            if any(name not in weights for name in names):
                return None
            shapes = [weights[name].shape for name in names]
            params[key] = {
                **param,
                "shapes": shapes,
                "numels": [math.prod(shape) for shape in shapes],
            }
        entries.append({**entry, "params": params})
    return {**raw, "param_metadata": entries}


def setting(meta: dict[str, Any], name: str) -> Any:
    """A setting of the model: of `cfg.model` (a dict, an argparse.Namespace or omegaconf's), or of
    `args`; None if neither has it."""
    for tree in (fields_of(meta.get("cfg")).get("model"), meta.get("args")):
        value = fields_of(tree).get(name)
        if value is not None:
            return value_of(value)
    return None
