"""The way users convert today, for comparison: load each rank with torch, cut the buffers by the
map, save with MindSpore.

One process per rank, `--processes` at once. Written for this benchmark after what
MindSpeed-Core-MS's convert_pt2ckpt.py does (whole files in memory, one mindspore.save_checkpoint
per rank); it checks nothing and writes no metadata."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path

started = time.monotonic()
import mindspore  # noqa: E402
import torch  # noqa: E402

PREFIX = {"param": "", "exp_avg": "exp_avg.", "exp_avg_sq": "exp_avg_sq."}


def convert(job: tuple[Path, Path, Path]) -> None:
    """Convert one rank's folder by its layout file into one .ckpt, and make that durable."""
    rank, layout_file, target = job
    layout = json.loads(layout_file.read_text())
    first_layer = layout["chunks"][0]["layers"]["decoder.layers"][0]
    common = torch.load(rank / "model_optim_rng.pt", map_location="cpu", weights_only=False)
    saved = torch.load(rank / "distrib_optim.pt", map_location="cpu", weights_only=False)
    tensors = []
    for gbuf, buffer in enumerate(layout["optimizers"][0]["buffers"]):
        (states,) = saved[gbuf].values()
        before = _elements_before(buffer["buckets"])
        for parameter in buffer["params"]:
            start = parameter["start"] - before[parameter["bucket"]]
            end = parameter["end"] - before[parameter["bucket"]]
            for state, prefix in PREFIX.items():
                values = states[state][start:end].reshape(parameter["shape"]).numpy()
                tensors.append(
                    {
                        "name": prefix + _global_name(parameter["name"], first_layer),
                        "data": mindspore.Parameter(values),
                    }
                )
    for number, group in enumerate(common["optimizer"]["optimizer"]["param_groups"]):
        tensors.append(
            {"name": f"learning_rate_group_{number}", "data": mindspore.Parameter(group["lr"])}
        )
    target.parent.mkdir(parents=True)
    mindspore.save_checkpoint(tensors, str(target))
    _make_durable(target)


def _elements_before(buckets: list[dict]) -> list[int]:
    """What to take off a position in the padded buffer, by bucket, to find it among the unpadded
    ones in the file."""
    offsets, padding = [], 0
    for bucket in buckets:
        offsets.append(padding)
        padding += bucket["end"] - bucket["start"] - bucket["numel_unpadded"]
    return offsets


def _global_name(name: str, first_layer: int) -> str:
    parts = name.split(".")
    if "layers" in parts:
        at = parts.index("layers") + 1
        parts[at] = str(int(parts[at]) + first_layer)
    return ".".join(parts)


def _make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("source", type=Path, help="an iteration folder of bench/make_checkpoint.py")
    parser.add_argument("target", type=Path)
    parser.add_argument("--processes", type=int, default=4)
    args = parser.parse_args()
    print(f"imports {time.monotonic() - started:.2f}", flush=True)
    jobs = []
    for number, rank in enumerate(
        sorted(args.source.glob("mp_rank_*"), key=lambda path: path.name[::-1])
    ):
        _, tp, pp = rank.name.rsplit("_", 2)
        jobs.append(
            (
                rank,
                args.source / "param_map" / f"layout_tp{tp}_pp{pp}.json",
                args.target / f"rank_{number}" / "network.ckpt",
            )
        )
    with multiprocessing.get_context("fork").Pool(args.processes) as pool:
        pool.map(convert, jobs, chunksize=1)


if __name__ == "__main__":
    main()
