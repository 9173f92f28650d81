"""What FSDP says of the flat parameters of a metaseq checkpoint: which parameters lie in each, and
its padding.

`shard_metadata` (fairscale 0.4.13, FullyShardedDataParallel.local_metadata_dict) is in the file
itself, in the sidecar that patches/metaseq_param_map.patch writes beside it, or, for files that
lost it, in those of the checkpoint they were made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parammap.checkpoint.index import StoredTensor
from parammap.errors import RefusedError
from parammap.formats import torch_zip
from parammap.frameworks.metaseq import files as metaseq_files
from parammap.frameworks.metaseq import sidecar as sidecars

#: the word embedding, and the output layer that may be the same parameter by another name
EMBEDDING, OUTPUT = "decoder.embed_tokens.weight", "decoder.output_projection.weight"


@dataclass(frozen=True, slots=True)
class Flat:
    """A parameter as FSDP holds it: parameters one after the other, of which each shard has a
    chunk. `key` and `names` are full names; where parameters are not flattened it holds the one of
    its own name."""

    key: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))

    def chunk(self, shards: int) -> int:
        """How many elements each of so many shards holds."""
        return -(-self.numel // shards)

    def padding(self, shards: int, shard: int) -> int:
        """The zeros at the end of a shard, at most all of it."""
        chunk = self.chunk(shards)
        return min(chunk, max(0, (shard + 1) * chunk - self.numel))


@dataclass(frozen=True, slots=True)
class ShardMetadata:
    """A shard's metadata: all but `paddings`, by flat parameter, is the same in all shards of a
    part. `shared` are (name, other name of the same parameter); `raw` is the metadata as it was
    read."""

    flats: tuple[Flat, ...]
    paddings: tuple[int, ...] | None
    buffers: frozenset[str]
    shared: tuple[tuple[str, str], ...]
    raw: dict[str, Any]

    def same_model(self, other: ShardMetadata) -> bool:
        return (self.flats, self.buffers, self.shared) == (other.flats, other.buffers, other.shared)


def parsed(raw: Any, file: Path) -> ShardMetadata:
    """Raises RefusedError if it is of another form or contradicts itself."""
    try:
        entries = [(entry, entry["fsdp_path"], entry["params"]) for entry in raw["param_metadata"]]
        params = [
            (join(path, key), path, param) for _, path, own in entries for key, param in own.items()
        ]
        flats = tuple(
            Flat(
                key,
                tuple(join(path, name) for name in param["names"]),
                tuple(tuple(map(int, shape)) for shape in param["shapes"]),
            )
            for key, path, param in params
        )
        for flat, (_, _, param) in zip(flats, params, strict=True):
            if [math.prod(shape) for shape in flat.shapes] != list(param["numels"]) or len(
                flat.names
            ) != len(flat.shapes):
                raise RefusedError(
                    f"{file}: the shard metadata of {flat.key} gives other numbers of elements "
                    f"than its "
                    "shapes have; the metadata is damaged: name another with --metadata-from"
                )
        if any(entry.get("no_broadcast_optim_state") for entry, _, _ in entries):
            raise RefusedError(f"{file}: holds a mixture's experts, which cannot be converted yet")
        shared = tuple(
            (join(path, a), join(path, b))
            for entry, path, _ in entries
            for a, b in entry.get("shared_param_info", ())
        )
        paddings = tuple(param["padding"] for _, _, param in params)
        return ShardMetadata(flats, paddings, frozenset(raw["buffer_names"]), shared, raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RefusedError(
            f"{file}: its shard metadata is not of fairscale's form ({type(error).__name__}: "
            f"{error}); name "
            "another with --metadata-from"
        ) from error


def join(path: str, name: str) -> str:
    """A name below the path of a module, '' for the root."""
    return f"{path}.{name}" if path else name


def usual(tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """How metaseq wraps a model (models/transformer_decoder.py, fsdp_wrap of each layer and of the
    whole), for a source that was saved without: the root's parameters, then each layer's."""
    buffers = [name for name in tensors if name.endswith((".version", "_float_tensor"))]
    modules: dict[str, list[StoredTensor]] = {"": []}
    for name, held in tensors.items():
        if name not in buffers:
            path = "" if held.layer is None else f"decoder.layers.{held.layer}"
            modules.setdefault(path, []).append(held)
    tied = [(EMBEDDING, OUTPUT)] if OUTPUT not in tensors else []
    return {
        "param_metadata": [
            {
                "fsdp_path": path,
                "no_broadcast_optim_state": False,
                "shared_param_info": [] if path else tied,
                "params": {"flat_param_0": _param(path, within)} if within else {},
            }
            for path, within in modules.items()
        ],
        "buffer_names": buffers,
    }


def _param(path: str, within: list[StoredTensor]) -> dict[str, Any]:
    return {
        "names": [held.found.name.removeprefix(f"{path}.") for held in within],
        "shapes": [held.found.stored.shape for held in within],
        "numels": [held.found.stored.numel for held in within],
        "padding": 0,
    }


def borrowed(source: Path, parts: int) -> list[ShardMetadata]:
    """Each part's metadata, without paddings, of the checkpoint or of the folder of sidecars that
    SRC names.

    Raises RefusedError if it has none, or has another number of parts.
    """
    found = [
        _of_sidecar(path)
        for place in (source, source / "param_map")
        if place.is_dir()
        for path in sorted(place.glob("*-shard0.json"))
        if not path.name.startswith("args_")
    ]
    by_part = {part: metadata for part, metadata in found if metadata}
    if not by_part:
        files = metaseq_files.find(source)
        contents = [
            (part, shards[0], torch_zip.read(shards[0])) for part, shards in enumerate(files.parts)
        ]
        by_part = {
            part: parsed(content["shard_metadata"], path)
            for part, path, content in contents
            if isinstance(content, dict) and content.get("shard_metadata")
        }
    if sorted(by_part) != list(range(parts)):
        raise RefusedError(
            f"{source}: has shard metadata of the parts {sorted(by_part)} and not of the {parts} "
            f"parts "
            "wanted; name the checkpoint that these files were made from with --metadata-from"
        )
    return [
        ShardMetadata(one.flats, None, one.buffers, one.shared, one.raw)
        for _, one in sorted(by_part.items())
    ]


def _of_sidecar(path: Path) -> tuple[int, ShardMetadata | None]:
    sidecar = sidecars.read(path)
    return sidecar.get("model_part", 0), (
        parsed(raw, path) if (raw := sidecar.get("shard_metadata")) else None
    )
