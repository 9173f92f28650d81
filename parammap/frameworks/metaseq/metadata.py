"""What FSDP says of the flat parameters of a metaseq checkpoint: which parameters lie in each, and
its padding.

`shard_metadata` (fairscale 0.4.13, FullyShardedDataParallel.local_metadata_dict) is in the file
itself, in the sidecar that patches/metaseq_param_map.patch writes beside it, or, for files that
lost it, in those of the checkpoint they were made from."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parammap.errors import RefusedError
from parammap.formats import torch_zip
from parammap.frameworks.metaseq import files as metaseq_files

#: the sidecar of a file, {} standing for its name without ending; the second is a prototype's
_SIDECARS = ("layout_{}.json", "param_map_{}.json")


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


# ------------------------------------------------------------------------------------------------------------
# sidecars


def sidecar_of(file: Path, folder: Path | None, num_updates: int | None) -> dict[str, Any] | None:
    """The sidecar of a shard file, in `folder` or else in param_map beside it; None if there is
    none of this very save.

    Raises RefusedError if the one in a folder that was named is of another save.
    """
    file = file.resolve()
    # an upload renames checkpoint_N-….pt to checkpoint_N/checkpoint-….pt (metaseq, trainer.py,
    # cloud_upload_path)
    stems = (file.stem, file.parent.name + file.stem.removeprefix("checkpoint"))
    for path in (
        place / form.format(stem)
        for place in ([folder] if folder else [file.parent / "param_map"])
        for stem in stems
        for form in _SIDECARS
    ):
        if path.is_file():
            sidecar = _json(path)
            if num_updates in (None, sidecar.get("num_updates")):
                return sidecar
            if folder:
                raise RefusedError(
                    f"{path}: is of update {sidecar.get('num_updates')} and {file.name} of "
                    f"{num_updates}; "
                    "name the right folder with --sidecar"
                )
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RefusedError(
            f"{path}: cannot be read as JSON ({error}); copy it again from its source"
        ) from error
    if not isinstance(content, dict) or "file" not in content:
        raise RefusedError(
            f"{path}: is not a sidecar of a metaseq checkpoint; name the right folder with "
            f"--sidecar"
        )
    return content


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
    sidecar = _json(path)
    return sidecar.get("model_part", 0), (
        parsed(raw, path) if (raw := sidecar.get("shard_metadata")) else None
    )
