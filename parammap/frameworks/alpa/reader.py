"""Reading weights as Alpa's llm_serving has them (see alpa.py), so that an output of ours can be
proved.

The names are metaseq's, or for BLOOM HF's; every tensor is whole, and nothing is kept beside the
weights. A folder that ParamMap made has a manifest, which tells the rows that the conversion added,
before the positions and behind the words, and the number of heads."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from parammap import families
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import Index, NameResolver, StoredTensor, TensorEntry
from parammap.checkpoint.manifest import MANIFEST, read_whole
from parammap.errors import RefusedError
from parammap.families import HF_BLOOM, METASEQ, WORD_EMBEDDING
from parammap.families.opt import BUFFERS
from parammap.formats import npy
from parammap.frameworks.alpa import serving as alpa
from parammap.frameworks.framework import EVERYTHING, ReadOptions
from parammap.plan.plan import in_a_row
from parammap.tensors.arrangement import PADDING, Sizes
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import MAIN_PARAM, LogicalTensor
from parammap.tensors.names import shorten_names
from parammap.tensors.shard import whole_of


def recognizes(source: Path) -> bool:
    return source.is_dir() and (
        _is_training(source)
        or any(
            families.find(name, dialect)
            for name in os.listdir(source)
            for dialect in (METASEQ, HF_BLOOM)
        )
    )


def _is_training(source: Path) -> bool:
    """Whether a folder holds training checkpoints of alpa.serialization (see training.py)."""
    return any(source.glob("checkpoint_*")) and any(source.glob("state.*/metadata_*"))


def read(source: Path, options: ReadOptions = EVERYTHING) -> Checkpoint:
    """Read a folder's headers. It has weights only, of one rank, no experts, and no iteration,
    which counts as 0.

    Raises RefusedError for an iteration asked for, a parameter that is missing, a file that is
    none, and a damaged one."""
    if _is_training(source):
        raise RefusedError(
            f"{source}: holds training checkpoints of Alpa, which are written here and not read; "
            "read what they were made from"
        )
    if options.iteration is not None or options.sidecar_folder is not None:
        raise RefusedError(
            f"{source}: holds Alpa's weights, which have no iteration and no sidecar; leave these "
            f"flags out"
        )
    names = sorted(set(os.listdir(source)) - {MANIFEST})
    layers = [layer[1] for name in names if (layer := families.layer_of(name))]
    num_layers = 1 + max(layers, default=-1)
    is_bloom = any(families.find(name, HF_BLOOM) for name in names)
    _check_names(source, set(names), num_layers, is_bloom)
    rows, heads = _rows_converted(source), recorded(source).get("num_attention_heads")
    naming = NameResolver(
        HF_BLOOM if is_bloom else METASEQ,
        Layout(),
        None,
        None,
        Sizes(heads, heads, vocab=rows.get(WORD_EMBEDDING)),
        gated=False,
        tied=True,
    )
    held = [
        naming.hold(TensorEntry(name, Place(), MAIN_PARAM, npy.read(source / name)))
        for name in names
    ]
    index = Index(
        [_without_added(one, rows) if one.canonical == alpa.POSITIONS else one for one in held],
        Layout(),
    )
    index.check_complete()
    return Checkpoint(
        "alpa",
        source,
        0,
        Layout(),
        index,
        False,
        num_layers,
        rank_folders={(0, 0, 0): source},
        rank_metadata={},
    )


def _check_names(source: Path, names: set[str], num_layers: int, is_bloom: bool) -> None:
    model, files = ("BLOOM", alpa.bloom_files) if is_bloom else ("OPT", alpa.opt_files)
    expected = set(files(num_layers))
    foreign = sorted(names - expected - {f"decoder.{name}" for name in BUFFERS})
    if foreign:
        raise RefusedError(
            f"{source / foreign[0]}: is no parameter of Alpa's {model}; move it to another folder"
        )
    if missing := sorted(expected - names):
        raise RefusedError(
            f"{source}: lacks {len(missing)} parameters of Alpa's {model} of {num_layers} layers: "
            f"{shorten_names(missing)}; copy the whole folder"
        )


def recorded(source: Path) -> dict[str, Any]:
    """What the manifest of a conversion says of the model; {} without one."""
    manifest = read_whole(source)
    return manifest.notes.get("alpa", {}) if manifest else {}


def _rows_converted(source: Path) -> dict[str, int]:
    """The rows that each weight had in the source of the conversion, by canonical name; {} without
    a manifest."""
    manifest = read_whole(source)
    return {
        one.name: one.shape[0]
        for one in (manifest.digests if manifest else ())
        if one.state == MAIN_PARAM and one.shape
    }


def _without_added(positions: StoredTensor, rows: dict[str, int]) -> StoredTensor:
    """The table of positions, with the rows before those of the source as its padding."""
    tensor = positions.parts[0].tensor
    added = tensor.rows - rows.get(alpa.POSITIONS, tensor.rows) if tensor else 0
    if tensor is None or added <= 0:
        return positions
    padding = LogicalTensor(
        MAIN_PARAM, f"{tensor.name}.{PADDING}", tensor.dtype, (added, *tensor.shape[1:])
    )
    kept = replace(tensor, shape=(tensor.rows - added, *tensor.shape[1:]))
    return replace(positions, parts=in_a_row(map(whole_of, (padding, kept))))
