"""OPT-175B's files without content: the sizes and shard metadata of the real ones
(tests/data/metaseq/opt175b), and holes for tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from parammap.formats import torch_zip
from parammap.tensors.logical import TensorSpec

METADATA = Path(__file__).parent.parent / "data/metaseq/opt175b/shard_metadata_part-5.json"
PARTS, SHARDS = 8, 124


def write(folder: Path, parts: Iterable[int] = range(PARTS)) -> None:
    """Write these parts' shards into a folder. Parts differ in no size, so that all have the
    metadata of part 5."""
    raw, parts = json.loads(METADATA.read_text()), list(parts)
    for shard in range(SHARDS):
        tree = _shard(raw, shard)
        for part in parts:
            _write_sparse(folder / f"checkpoint_last-model_part-{part}-shard{shard}.pt", tree)


def _shard(raw: dict, shard: int) -> dict:
    entries = [
        {
            **entry,
            "params": {
                key: {**param, "padding": _padding(param, shard)}
                for key, param in entry["params"].items()
            },
        }
        for entry in raw["entries"]
    ]
    sizes = {
        ".".join(filter(None, (entry["fsdp_path"], key))): _chunk(param)
        for entry in entries
        for key, param in entry["params"].items()
    }
    model = {
        name: TensorSpec(name, "float16", (numel,))
        for name, numel in {**sizes, "decoder.version": 1}.items()
    }
    return {
        "model": model,
        "shard_metadata": {"param_metadata": entries, "buffer_names": raw["buffer_names"]},
    }


def _chunk(param: dict) -> int:
    return -(-sum(param["numels"]) // SHARDS)


def _padding(param: dict, shard: int) -> int:
    return min(_chunk(param), max(0, (shard + 1) * _chunk(param) - sum(param["numels"])))


def _write_sparse(path: Path, tree: dict) -> None:
    """A file of torch.save's form whose tensors are holes."""
    with open(path, "wb") as file:
        for segment in torch_zip.frame(tree, path.name).segments:
            if hasattr(segment, "data"):
                file.write(segment.data)
            else:
                file.seek(segment.nbytes, os.SEEK_CUR)
