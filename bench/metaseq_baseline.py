"""The way users bring OPT to Alpa today, for comparison: three programs that load with torch.load
and save all of it.

  python bench/metaseq_baseline.py reshard|glue|numpy SRC DST

Written for this benchmark after what metaseq's reshard_fsdp and reshard_mp and Alpa's
step_3_convert_to_numpy_weights do; it checks nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import torch


def reshard(source: Path, scratch: Path) -> None:
    """Each part's shards to a file of named parameters (what metaseq's reshard_fsdp does to get one
    shard)."""
    for part in range(len(list(source.glob("*-shard0.pt")))):
        count = len(list(source.glob(f"*-model_part-{part}-shard*.pt")))
        shards = [
            torch.load(
                source / f"checkpoint_last-model_part-{part}-shard{number}.pt",
                map_location="cpu",
                weights_only=False,
            )
            for number in range(count)
        ]
        model = {}
        for number, module in enumerate(shards[0]["shard_metadata"]["param_metadata"]):
            path = f"{module['fsdp_path']}." if module["fsdp_path"] else ""
            for key, param in module["params"].items():
                chunks = []
                for shard in shards:
                    padding = shard["shard_metadata"]["param_metadata"][number]["params"][key][
                        "padding"
                    ]
                    chunk = shard["model"][path + key]
                    chunks.append(chunk[: chunk.numel() - padding])
                for name, values, shape in zip(
                    param["names"],
                    torch.cat(chunks).split(param["numels"]),
                    param["shapes"],
                    strict=True,
                ):
                    model[path + name] = values.view(shape)
        model |= {
            name: shards[0]["model"][name] for name in shards[0]["shard_metadata"]["buffer_names"]
        }
        torch.save({"cfg": shards[0]["cfg"], "model": model}, scratch / f"part{part}.pt")


def glue(source: Path, scratch: Path) -> None:
    """The parts to a singleton with q, k and v apart (what reshard_mp and stitch_fsdp_ckpt do)."""
    parts = [
        torch.load(scratch / f"part{part}.pt", map_location="cpu", weights_only=False)["model"]
        for part in range(len(list(scratch.glob("part*.pt"))))
    ]
    model = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if "qkv_proj" in name:
            for atom, thirds in zip(
                "kvq", zip(*(value.chunk(3) for value in values), strict=True), strict=True
            ):
                model[name.replace("qkv", atom)] = torch.cat(thirds)
        elif "embed_tokens" in name or "fc1" in name:
            model[name] = torch.cat(values)
        elif name.endswith(("fc2.weight", "out_proj.weight")):
            model[name] = torch.cat(values, dim=1)
        else:
            model[name] = values[0].clone()
    torch.save({"model": model}, scratch / "restored.pt")


def save_numpy(scratch: Path, target: Path) -> None:
    """The singleton to Alpa's folder (what its step_3_convert_to_numpy_weights does), durable."""
    target.mkdir()
    for name, values in torch.load(scratch / "restored.pt", map_location="cpu", weights_only=False)[
        "model"
    ].items():
        with open(target / name, "wb") as file:
            numpy.save(file, values.numpy())
            file.flush()
            os.fsync(file.fileno())


STEPS: dict[str, Callable[[Path, Path], None]] = {
    "reshard": reshard,
    "glue": glue,
    "numpy": save_numpy,
}


if __name__ == "__main__":
    STEPS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
