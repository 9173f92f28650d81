"""Translates the maps of the hook's prototype (`mp_rank_*/param_map.json`) into layout files: two
checkpoints have them.

The prototype recorded the buffers only: what else a layout file holds comes from the arguments
saved with the model."""

import json
import shutil
from pathlib import Path

from parammap.formats import torch_zip

SHORT = "torch."


def translated(golden: Path, target: Path) -> Path:
    """A copy of the checkpoint with layout files in place of the prototype's maps."""
    shutil.copytree(golden, target)
    (iteration,) = target.glob("iter_*")
    (iteration / "param_map").mkdir()
    for folder in iteration.glob("mp_rank_*"):
        tp, pp = (int(part) for part in folder.name.split("_")[2:])
        prototype = json.loads((folder / "param_map.json").read_text())
        (folder / "param_map.json").unlink()
        args = torch_zip.read(folder / "model_optim_rng.pt")["args"].state
        layout = _layout(prototype, args, tp, pp)
        (iteration / "param_map" / f"layout_tp{tp:02}_pp{pp:03}.json").write_text(
            json.dumps(layout)
        )
    return target


def _layout(prototype: dict, args: dict, tp: int, pp: int) -> dict:
    return {
        "schema": "parammap.layout",
        "version": 1,
        "iteration": prototype["iteration"],
        "checkpoint_format": "torch",
        "framework": {"name": "megatron", "core_version": "0.8.0", "torch_version": "2.13.0"},
        "parallel": {
            "tp": 2,
            "pp": 2,
            "vpp": 1,
            "ep": 1,
            "etp": 2,
            "cp": 1,
            "dp": 1,
            "order": "tp-cp-ep-dp-pp",
            "world_size": 4,
        },
        "rank": {"global": pp * 2 + tp, "tp": tp, "pp": pp, "ep": 0, "etp": tp},
        "model": {
            "num_layers": args["num_layers"],
            "num_attention_heads": args["num_attention_heads"],
            "num_query_groups": args["num_attention_heads"],
        },
        "chunks": [{"vpp": 0, "layers": {}, "pre_process": pp == 0, "post_process": pp == 1}],
        "optimizers": [
            {
                "class": "DistributedOptimizer",
                "kind": "dense",
                "data_parallel_size": 1,
                "buffers": [_buffer(buffer) for buffer in link],
            }
            for link in prototype["optimizers"]
        ],
    }


def _buffer(buffer: dict) -> dict:
    return {
        "chunk": 0,
        "param_dtype": buffer["param_dtype"].removeprefix(SHORT),
        "grad_dtype": buffer["grad_dtype"].removeprefix(SHORT),
        "numel": buffer["numel"],
        "buckets": [
            {"start": start, "end": end, "numel_unpadded": unpadded}
            for (start, end), unpadded in zip(
                buffer["bucket_indices"], buffer["numel_unpadded"], strict=True
            )
        ],
        "params": [
            {
                **param,
                "name": _key(param["name"]),
                "dtype": param["dtype"].removeprefix(SHORT),
                "partition_dim": None,
                "partition_stride": 1,
            }
            for param in buffer["params"]
        ],
    }


def _key(name: str) -> str:
    """The checkpoint's key of a parameter (a legacy last stage renames its copy of the
    embedding)."""
    return "word_embeddings_for_head.weight" if name == "word_embeddings.weight" else name
