"""Which files a DeepSpeed checkpoint consists of, by their names.

A root has `latest`, the name of a folder such as global_step3 (or `latest_universal`, that of a universal checkpoint), with
  layer_{I:02d}-model_{tp:02d}-model_states.pt    a pipeline's layer I, or, where it has no tensor-parallel dimension,
  layer_{I:02d}-model_states.pt
  mp_rank_{m:02d}_model_states.pt                 m = stage · tp + tensor-parallel rank; all of the model without a pipeline
  [bf16_]zero_pp_rank_{d}_mp_rank_{m:02d}[_]optim_states.pt    d is the data-parallel rank, for all its name
(deepspeed 0.3.17 … 0.19.8, runtime/engine.py and runtime/pipe/module.py, save_checkpoint).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from parammap.checkpoint import trackers
from parammap.errors import RefusedError
from parammap.tensors import grid

LATEST, LATEST_UNIVERSAL, ZERO, STATE_FILE = (
    "latest",
    "latest_universal",
    "zero",
    "optimizer_state.pt",
)
_Key = TypeVar("_Key")
_STEP = re.compile(r"global_step(\d+)")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_SHARD = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
#: files of what is not read, and what it is
_FOREIGN = {
    re.compile(
        r"zero_pp_rank_\d+_mp_rank_\d+_?model_states\.pt"
    ): "is of ZeRO stage 3, which cuts each parameter; only stages 1 and 2 can be converted",
    re.compile(
        r"layer_\d+_expert_.*|expp_rank_.*|expert_.*_model_states\.pt"
    ): "is of a mixture of experts, which cannot be converted yet",
}


@dataclass(slots=True)
class DeepSpeedFiles:
    """A checkpoint's files: layers by (layer function, tp), models by m, shards by (m, dp)."""

    folder: Path
    layers: dict[tuple[int, int], Path] = field(default_factory=dict)
    models: dict[int, Path] = field(default_factory=dict)
    shards: dict[tuple[int, int], Path] = field(default_factory=dict)

    @property
    def is_universal(self) -> bool:
        return (self.folder / ZERO).is_dir()

    def tp(self) -> int:
        """The tensor-parallel ranks by the names: those of a layer, or, without a pipeline, all
        ranks of the model."""
        return 1 + max(tp for _, tp in self.layers) if self.layers else len(self.models)


def recognizes(source: Path) -> bool:
    if not source.is_dir():
        return False
    return any(
        (source / name).is_file() for name in (LATEST, LATEST_UNIVERSAL, f"{ZERO}/{STATE_FILE}")
    ) or any(
        _MODEL.fullmatch(name) or _LAYER.fullmatch(name) or _STEP.fullmatch(name)
        for name in os.listdir(source)
    )


def find(source: Path, iteration: int | None = None) -> DeepSpeedFiles:
    """The files of the checkpoint that SRC names: a root, or a folder of one step. Raises
    RefusedError if there is none, or if some of them are missing or of a kind that is not read."""
    files = DeepSpeedFiles(_folder(source, iteration))
    for name in sorted(os.listdir(files.folder)):
        path = files.folder / name
        for pattern, what in _FOREIGN.items():
            if pattern.fullmatch(name):
                raise RefusedError(f"{path}: {what}")
        if match := _LAYER.fullmatch(name):
            _add(files.layers, (int(match[1]), int(match[2] or 0)), path)
        elif match := _MODEL.fullmatch(name):
            _add(files.models, int(match[1]), path)
        elif match := _SHARD.fullmatch(name):
            _add(files.shards, (int(match[2]), int(match[1])), path)
    if not files.models:
        raise RefusedError(
            f"{files.folder}: has no mp_rank_*_model_states.pt; is it a checkpoint of DeepSpeed?"
        )
    if not files.is_universal:
        _check(files)
    return files


def _add(files: dict[_Key, Path], key: _Key, path: Path) -> None:
    if key in files:
        raise RefusedError(
            f"{path}: is of the same rank as {files[key].name}; leave only one of them"
        )
    files[key] = path


def _folder(source: Path, iteration: int | None) -> Path:
    if not source.is_dir():
        raise RefusedError(
            f"{source}: no such folder; name a save folder or one of its global_stepN folders"
        )
    if any(_MODEL.fullmatch(name) or name == ZERO for name in os.listdir(source)):
        return source
    if iteration is not None:
        folder = source / f"global_step{iteration}"
    else:
        tracker = next(
            (source / name for name in (LATEST, LATEST_UNIVERSAL) if (source / name).is_file()),
            None,
        )
        if tracker is None:
            raise RefusedError(f"{source}: has no {LATEST}; choose a step with --iteration")
        folder = source / trackers.read(tracker)
    if not folder.is_dir():
        raise RefusedError(f"{folder}: no such folder; choose another step with --iteration")
    return folder


def _check(files: DeepSpeedFiles) -> None:
    """Refuse unless each set of files is a whole grid."""
    tp = files.tp()
    _check_grid(
        files.folder,
        "mp_rank_{:02d}_model_states.pt",
        {(m,) for m in files.models},
        [range(_end(files.models))],
    )
    if len(files.models) % tp:
        raise RefusedError(
            f"{files.folder}: {len(files.models)} mp_rank files are not whole stages of {tp} "
            f"tensor-parallel "
            "ranks; copy the whole checkpoint"
        )
    if files.layers:
        layers = sorted({layer for layer, _ in files.layers})
        _check_grid(
            files.folder,
            "layer_{:02d}-model_{:02d}-model_states.pt",
            files.layers,
            [layers, range(tp)],
        )
    if files.shards:
        dp = _end(dp for _, dp in files.shards)
        _check_grid(
            files.folder,
            "the optimizer's shard of mp_rank {:02d}, data-parallel rank {}",
            files.shards,
            [range(len(files.models)), range(dp)],
        )


def _end(numbers: Iterable[int]) -> int:
    return 1 + max(numbers)


def _check_grid(
    folder: Path, name: str, there: Collection[grid.Cell], sides: Sequence[Sequence[int]]
) -> None:
    if missing := grid.missing(there, sides):
        count, first = missing
        raise RefusedError(
            f"{folder}: {count} files are missing, the first is {name.format(*first)}; copy the "
            "whole checkpoint"
        )
    if extra := grid.extra(there, sides):
        raise RefusedError(
            f"{folder}: {name.format(*extra)} is of a rank that has no model; leave it out"
        )
