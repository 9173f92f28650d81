"""How FSDP holds a Metaseq checkpoint's parameters, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.formats import torch_zip
from parammap.frameworks.metaseq.metadata import join
from parammap.frameworks.metaseq.sidecar import FILES


def layout(sizes: Mapping[str, Any]) -> str:
    parts, shards = sizes["tp"], sizes["dp"]
    return (
        f"{parts:,} model-parallel part{'s' * (parts != 1)} (tp) × "
        f"{shards:,} FSDP shard{'s' * (shards != 1)} (dp)"
    )


def flat_parameters(
    checkpoint: Checkpoint, files: dict[Coordinates, list[Path]]
) -> list[dict[str, Any]]:
    """Each parameter as FSDP holds it, with the `parts` that hold it alike; [] where files hold
    whole tensors.

    `numel` are the elements of a part's `parameters` in it; each of `shards` holds `chunk`, and
    `padding` of all the shards' elements belong to none (fairscale 0.4.13,
    FullyShardedDataParallel._get_shard)."""
    shards = checkpoint.layout.dp
    parts: dict[tuple[str, int, int], list[int]] = {}
    for rank, meta in sorted(checkpoint.rank_metadata.items()):
        held = torch_zip.read(files[rank][0])["model"]
        for entry in (meta.get("shard_metadata") or {}).get("param_metadata", ()):
            for key, param in entry["params"].items():
                one = join(entry["fsdp_path"], key), len(param["names"]), sum(param["numels"])
                if one[0] in held:
                    parts.setdefault(one, []).append(rank[0])
    return [
        {
            "key": key,
            "parts": held,
            "parameters": parameters,
            "numel": numel,
            "shards": shards,
            "chunk": -(-numel // shards),
            "padding": -numel % shards,
        }
        for (key, parameters, numel), held in parts.items()
    ]


def sidecar(checkpoint: Checkpoint, files: list[Path]) -> dict[str, Any] | None:
    """The sidecar beside a checkpoint's files."""
    folder = checkpoint.folder / "param_map"
    wanted = {form.format(file.stem) for file in files for form in FILES}
    found = [path for path in folder.iterdir() if path.name in wanted] if folder.is_dir() else []
    return (
        {
            "kind": "layout",
            "folder": str(folder),
            "files": len(found),
            "ranks": checkpoint.layout.tp,
            "iteration": checkpoint.iteration,
        }
        if found
        else None
    )
