"""One file of a metaseq checkpoint: its model, its optimizer's states, and what FSDP says of them,
there or in a sidecar."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from parammap.errors import RefusedError
from parammap.formats import torch_zip, tree_schema
from parammap.formats.pickles import Opaque
from parammap.formats.tree_schema import (
    anything,
    count,
    dict_of,
    kind,
    list_of,
    optional,
    record,
)
from parammap.frameworks.metaseq.metadata import ShardMetadata, parsed
from parammap.frameworks.metaseq.sidecar import sidecar_of
from parammap.tensors.logical import Stored
from parammap.tensors.names import shorten_names

#: what a file holds, as far as anything is asked of it
_CONTENT = record(
    {
        "model": dict_of(kind(str), anything),
        "optimizer_history": optional(list_of(record({"num_updates": optional(count)}))),
        "last_optimizer_state": optional(
            record({"state": optional(dict_of(kind(int), record({})))})
        ),
        "extra_state": optional(record({})),
    }
)


@dataclass(slots=True)
class ShardFile:
    """A file: the model's tensors, the optimizer's states by its own numbers, and what FSDP says of
    them. `rest` is the file without its model (of a part's first shard only), `rank` and `parts`
    what it says of who wrote it."""

    path: Path
    model: dict[str, Stored]
    states: dict[int, dict[str, Any]]
    metadata: ShardMetadata | None
    optimizer_index: dict[int, str] | None
    num_updates: int | None
    sidecar: dict[str, Any] | None
    rest: dict[str, Any] = field(default_factory=dict)
    rank: int | None = None
    parts: int | None = None

    @property
    def save(self) -> Save:
        return Save(self.path, self.num_updates, bool(self.states))

    def with_same_model(self, other: ShardFile) -> ShardFile:
        """Another shard of the same part, which comes to share what both say of the model.

        Raises RefusedError if they are of different saves.
        """
        self.save.check_same(other.save)
        mine, theirs = self.metadata, other.metadata
        if (mine is None) != (theirs is None) or (mine and theirs and not mine.same_model(theirs)):
            raise RefusedError(
                f"{other.path}: its shard metadata is of another model than {self.path.name}'s; "
                "copy the checkpoint again"
            )
        if mine and theirs:
            other.metadata = replace(mine, paddings=theirs.paddings)
        return other


@dataclass(frozen=True, slots=True)
class Save:
    """What tells one save from another: a file, the update that it says it is of, whether it has an
    optimizer."""

    path: Path
    num_updates: int | None
    with_optimizer: bool

    def check_same(self, other: Save) -> None:
        if (self.num_updates, self.with_optimizer) != (other.num_updates, other.with_optimizer):
            raise RefusedError(
                f"{other.path}: is of another save than {self.path.name} ({other._told()} and "
                f"{self._told()}); copy the checkpoint again"
            )

    def _told(self) -> str:
        return (
            f"update {self.num_updates}, {'with' if self.with_optimizer else 'without'} optimizer"
        )


def read_shard(
    path: Path, is_first: bool, sidecar_folder: Path | None, ema: bool = False
) -> ShardFile:
    """Read a file's headers; `ema` takes the moving average of the weights in their place.

    Raises RefusedError if it is no metaseq checkpoint, or its sidecar is of another save.
    """
    content = torch_zip.read(path)
    tree_schema.check(content, _CONTENT, path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not model:
        raise RefusedError(f"{path}: holds no model; is it a metaseq checkpoint?")
    if ema:
        extra = content.get("extra_state") or {}
        model = next((extra[key] for key in ("ema_fp32_params", "ema") if extra.get(key)), None)
        if model is None:
            raise RefusedError(
                f"{path}: holds no moving average of the weights; leave --is-ema out"
            )
    if strange := sorted(
        str(name) for name, value in model.items() if not isinstance(value, Stored)
    ):
        raise RefusedError(
            f"{path}: its model holds what is no tensor: {shorten_names(strange)}; save plain "
            f"tensors"
        )
    history = content.get("optimizer_history") or [{}]
    num_updates = history[-1].get("num_updates")
    raw = content.get("shard_metadata")
    sidecar = sidecar_of(path, sidecar_folder, num_updates) if is_first or not raw else None
    own = parsed(raw, path) if raw else None
    said = (
        parsed(sidecar["shard_metadata"], path)
        if sidecar and sidecar.get("shard_metadata")
        else None
    )
    if own and said and (not own.same_model(said) or own.paddings != said.paddings):
        raise RefusedError(
            f"{path}: its sidecar describes another file; name the right folder with --sidecar"
        )
    index = (
        {int(number): key for number, key in sidecar["optimizer_index"].items()}
        if sidecar and sidecar.get("optimizer_index")
        else None
    )
    states = (content.get("last_optimizer_state") or {}).get("state") or {}
    rest = {key: value for key, value in content.items() if key != "model"} if is_first else {}
    cfg = fields_of(content.get("cfg"))
    rank, parts = (
        value_of(fields_of(cfg.get(section)).get(name))
        for section, name in (
            ("distributed_training", "distributed_rank"),
            ("common", "model_parallel_size"),
        )
    )
    return ShardFile(
        path, model, states, own or said, index, num_updates, sidecar, rest, rank, parts
    )


def fields_of(tree: Any) -> dict[str, Any]:
    """The fields of an object; of omegaconf's containers (omegaconf 2, base.Container) the
    content."""
    fields = tree if isinstance(tree, dict) else tree.attributes if isinstance(tree, Opaque) else {}
    content = fields.get("_content")
    return content if isinstance(content, dict) else fields


def value_of(field: Any) -> Any:
    """A field's value, out of omegaconf's node if it has one."""
    return fields_of(field).get("_val") if isinstance(field, Opaque) else field
