"""Which folders and files a Megatron-LM checkpoint in torch format consists of, and which rank each is
of.

`<save>/latest_checkpointed_iteration.txt` and
`<save>/iter_NNNNNNN/mp_rank_TT[_PPP][_EEE]/{model_optim_rng.pt,distrib_optim.pt}` (Megatron-LM,
training/checkpointing.py, core_r0.6.0 … main)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parammap.checkpoint import extra_states, trackers
from parammap.checkpoint.checkpoint import Coordinates
from parammap.checkpoint.index import TensorEntry
from parammap.checkpoint.sidecar import Sidecar
from parammap.checkpoint.trackers import RELEASE
from parammap.errors import RefusedError
from parammap.formats import torch_zip, tree_schema
from parammap.frameworks.megatron import saved
from parammap.frameworks.megatron.facts import args_of
from parammap.frameworks.megatron.structure import specified
from parammap.tensors.layout import Place
from parammap.tensors.logical import MODEL_PARAM, Stored

MODEL_FILE, OPTIMIZER_FILE, TRACKER = (
    "model_optim_rng.pt",
    "distrib_optim.pt",
    "latest_checkpointed_iteration.txt",
)
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?$")
_ITERATION_FOLDER = re.compile(rf"iter_(\d{{7}})$|{RELEASE}$")


@dataclass(slots=True)
class MegatronRank:
    """One rank's folder: whose it is, and its model file's content (tensors as Stored)."""

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

    def tensors(self) -> list[TensorEntry]:
        """The same as entries."""
        return [
            TensorEntry(name, replace(self.place, vpp=chunk), MODEL_PARAM, stored)
            for chunk, tensors in self.chunks().items()
            for name, stored in tensors.items()
        ]

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
    return trackers.iteration_folder(tracker)


def read_ranks(folder: Path, sidecar: Sidecar | None) -> list[MegatronRank]:
    """All ranks of an iteration's folder. Raises RefusedError for a file that is missing or no
    checkpoint's."""
    matches = {
        path: match for path in sorted(folder.iterdir()) if (match := _RANK_FOLDER.match(path.name))
    }
    if not matches:
        raise RefusedError(
            f"{folder}: has no mp_rank_* folder; is it saved in Megatron-LM's torch format?"
        )
    contents = {path: _content(path) for path in matches}
    second_is_ep = _second_number_is_ep(contents, sidecar)
    ranks = []
    for path, match in matches.items():
        tp, second, third = (int(number or 0) for number in match.groups())
        place = Place(tp, 0, second) if second_is_ep else Place(tp, second, third)
        ranks.append(MegatronRank(path, place, contents[path]))
    return ranks


def _content(folder: Path) -> dict[str, Any]:
    path = folder / MODEL_FILE
    if not path.is_file():
        raise RefusedError(f"{path}: missing; copy the whole checkpoint")
    content = torch_zip.read(path)
    tree_schema.check(content, saved.model_file, path)
    return dict(content)


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


def read_rank(folder: Path, place: Place) -> MegatronRank:
    """One rank's folder."""
    return MegatronRank(folder, place, _content(folder))


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
