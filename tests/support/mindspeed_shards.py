"""Lay tensors out as MindSpeed-Core-MS's distributed optimizer (r0.1.0) does and save them with the
real mindspore.

The layout is that of its ParamAndGradBuffer: parameters in reverse order; with memory alignment
each fills up to a multiple of 512 bytes (of its own dtype, 32 bytes to spare) and a bucket to a
multiple of 512 × dp. That this is what its own code does is tested where MINDSPEED_CORE_MS names a
checkout. `python tests/support/mindspeed_shards.py SPEC.npz` runs in its own process: it saves the
arrays called `file|name`, bfloat16 ones `file|bf16:name`, into those files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

PREFIXES = ("", "exp_avg.", "exp_avg_sq.")
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass
class Shapes:
    """One buffer: shapes by name in the model's order, the dtype of its parameters, how it is cut
    into buckets."""

    shapes: dict[str, tuple[int, ...]]
    dtype: str = "float32"
    bucket_size: int | None = None
    aligned: bool = True


@dataclass
class Laid:
    """Where the parameters lie: name → (bucket, start, end) in the buffer, and each bucket's
    (start, end, used)."""

    ranges: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    buckets: list[tuple[int, int, int]] = field(default_factory=list)


def lay(buffer: Shapes, dp: int) -> Laid:
    laid, itemsize = Laid(), ITEMSIZE[buffer.dtype]
    align = dp * 512 if buffer.aligned else dp
    position = first = 0

    def close() -> None:
        nonlocal position, first
        used = position - first
        position += -(used * itemsize) % align // itemsize
        laid.buckets.append((first, position, used))
        first = position

    for name, shape in reversed(buffer.shapes.items()):
        if buffer.bucket_size and position - first >= buffer.bucket_size:
            close()
        numel = int(np.prod(shape))
        laid.ranges[name] = len(laid.buckets), position, position + numel
        position += numel
        if buffer.aligned:
            position += ((numel * itemsize + 543) // 512 * 512 - numel * itemsize) // itemsize
    close()
    return laid


def strategy(buffers: list[Shapes], ranks: list[int], zero3: list[str] | None) -> dict:
    """The content of dist_opt_shard_info_rank_N-0_0.json; `zero3` None: as core/optimizer writes
    it, without that key."""
    laid = [lay(buffer, len(ranks)) for buffer in buffers]
    result = {
        "dp_rank_list": ranks,
        "param_info": {
            name: {"range_map": [b, *at], "shape": buffer.shapes[name], "dtype": buffer.dtype}
            for b, (buffer, where) in enumerate(zip(buffers, laid, strict=True))
            for name, at in where.ranges.items()
        },
        "buffer_info": {
            b: {
                "buckets": {
                    k: [end - start, used] for k, (start, end, used) in enumerate(where.buckets)
                },
                "buffer_size": where.buckets[-1][1],
                "buffer_numel_unpadded": sum(used for *_, used in where.buckets),
                "bucket_num": len(where.buckets),
            }
            for b, where in enumerate(laid)
        },
    }
    return result if zero3 is None else {**result, "zero3_params": zero3}


def shards(
    buffers: list[Shapes], truth: dict[str, np.ndarray], dp: int
) -> list[dict[str, np.ndarray]]:
    """Each rank's flat shards of the truth; gaps and padding hold garbage, so that nobody takes
    them for data."""
    ranks: list[dict[str, np.ndarray]] = [{} for _ in range(dp)]
    for b, buffer in enumerate(buffers):
        laid = lay(buffer, dp)
        for prefix in PREFIXES:
            flat = np.full(laid.buckets[-1][1], np.float32("nan"))
            for name, (_, start, end) in laid.ranges.items():
                flat[start:end] = truth[prefix + name].reshape(-1)
            for k, (start, end, _) in enumerate(laid.buckets):
                for rank, part in zip(ranks, np.split(flat[start:end], dp), strict=True):
                    rank[f"{prefix}buffer_{b}_bucket_{k}"] = part
    return ranks


def write_strategy(folder: Path, rank: int, content: dict) -> Path:
    path = folder / f"rank_{rank}" / f"dist_opt_shard_info_rank_{rank}-0_0.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=4))
    return path


def save(files: dict[Path, dict[str, np.ndarray]], work: Path) -> None:
    """Save each file's tensors, in their order, with mindspore.save_checkpoint, one process for all
    files."""
    spec = work / "spec.npz"
    np.savez(
        spec,
        **{
            f"{path}|{name}": array
            for path, arrays in files.items()
            for name, array in arrays.items()
        },
    )
    run = subprocess.run(
        [sys.executable, __file__, str(spec)], capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-2000:]


def _main(spec: str) -> None:
    import mindspore

    files: dict[str, dict] = {}
    for key, array in np.load(spec).items():
        path, name = key.split("|")
        bfloat16 = name.startswith("bf16:")
        tensor = (
            mindspore.Tensor(array, mindspore.bfloat16) if bfloat16 else mindspore.Tensor(array)
        )
        files.setdefault(path, {})[name.removeprefix("bf16:")] = tensor
    for path, tensors in files.items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        mindspore.save_checkpoint(
            [{"name": name, "data": tensor} for name, tensor in tensors.items()],
            path,
            format=path.rsplit(".", 1)[1],
        )


if __name__ == "__main__":
    _main(sys.argv[1])
