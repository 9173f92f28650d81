"""Writes the live training state of a rank to a file that numpy alone can read: the truth that
conversions are held to.

Nothing here goes through checkpoint code or the hook: values are taken from the live model
parameters and from the optimizer's own shards of each dp rank.

truth/tp{t:02}_pp{p:03}_ep{e:03}.npz holds, for each chunk c and each parameter (by its name in the checkpoint):
  {c}/{name}/weight               the model's parameter; bf16 as its bits in uint16
  {c}/{name}/{main,exp_avg,exp_avg_sq}  fp32, gathered over dp, in the parameter's shape
  meta                            JSON: see `_meta`
resumed/ holds the same, of a run that goes on from a checkpoint, as it was before the first step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from examples.tiny.save import is_first_of_expert_data_parallel
from examples.tiny.unique import TIED, Shard, leaf_optimizers, shards

ROLES = ("main", "exp_avg", "exp_avg_sq")
Key = tuple[int, str]  # chunk, name


def write(
    folder: Path,
    args: argparse.Namespace,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    release: str,
) -> None:
    """Gather over dp and write this rank's file, where it is the one to write a model file.
    Collective over dp."""
    params = {
        (index, name): param
        for index, chunk in enumerate(chunks)
        for name, param in chunk.named_parameters()
    }
    state = optimizer_state(optimizer, params)
    if not is_first_of_expert_data_parallel():
        return
    arrays = {
        "meta": np.array(json.dumps(_meta(args, chunks, optimizer, scheduler, release, params)))
    }
    for (chunk, name), param in params.items():
        arrays[f"{chunk}/{name}/weight"] = bits(param)
        for role in ROLES:
            arrays[f"{chunk}/{name}/{role}"] = state[chunk, name][role]
    folder.mkdir(parents=True, exist_ok=True)
    tp, pp, ep = _place()
    np.savez(folder / f"tp{tp:02}_pp{pp:03}_ep{ep:03}.npz", **arrays)


def optimizer_state(
    optimizer: Any, params: dict[Key, torch.nn.Parameter]
) -> dict[Key, dict[str, np.ndarray]]:
    """fp32 main weight and moments of every parameter, whole. Collective over each optimizer's dp
    group."""
    key_of = {param: key for key, param in params.items()}
    whole = {
        key: {role: np.empty(param.numel(), np.float32) for role in ROLES}
        for key, param in params.items()
    }
    covered = {key: np.zeros(param.numel(), np.int8) for key, param in params.items()}
    for leaf in leaf_optimizers(optimizer):
        own = [
            (
                key_of[shard.param],
                shard.start,
                shard.stop,
                [tensor.detach().numpy().copy() for tensor in (shard.main, *moments(shard))],
            )
            for shard in shards(leaf)
        ]
        gathered: list[Any] = [None] * dist.get_world_size(leaf.data_parallel_group)
        dist.all_gather_object(gathered, own, group=leaf.data_parallel_group)
        for key, start, stop, values in (shard for part in gathered for shard in part):
            covered[key][start:stop] += 1
            for role, value in zip(ROLES, values, strict=True):
                whole[key][role][start:stop] = value.reshape(-1)
    for key, count in covered.items():
        if not (count == 1).all():
            raise RuntimeError(
                f"{key}: the optimizer shards of the dp ranks do not cover each element exactly "
                f"once"
            )
    return {
        key: {role: whole[key][role].reshape(params[key].shape) for role in ROLES} for key in params
    }


def moments(shard: Shard) -> list[torch.Tensor]:
    """Zeros where no step has made them yet and none were loaded."""
    return [
        shard.state.get(role, torch.zeros_like(shard.main)) for role in ("exp_avg", "exp_avg_sq")
    ]


def bits(param: torch.Tensor) -> np.ndarray:
    """The parameter as numpy has it; bf16, which numpy lacks, as uint16."""
    tensor = param.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()


def _place() -> tuple[int, int, int]:
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
    )


def _meta(
    args: argparse.Namespace,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    release: str,
    params: dict[Key, torch.nn.Parameter],
) -> dict[str, Any]:
    """The release, args, this rank's place, global layer numbers by chunk; facts of parameters,
    groups and buffers."""
    leaves = leaf_optimizers(optimizer)
    names = {param: f"{chunk}/{name}" for (chunk, name), param in params.items()}
    return {
        "core": release,
        "args": {
            name: value
            for name, value in vars(args).items()
            if isinstance(value, (int, float, str, type(None)))
        },
        "place": dict(zip(("tp", "pp", "ep"), _place(), strict=True)),
        "layers": [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in chunks],
        "params": {
            names[param]: {
                "dtype": str(param.dtype).removeprefix("torch."),
                "shape": list(param.shape),
                "expert": not getattr(param, "allreduce", True),
                "tied_copy": name == TIED[1] and not args.untie_embeddings_and_output_weights,
            }
            for (_, name), param in params.items()
        },
        "param_groups": [
            {name: value for name, value in group.items() if isinstance(value, (int, float))}
            for group in optimizer.param_groups
        ],
        "scheduler": scheduler.state_dict() if scheduler is not None else None,
        "buffers": [
            [
                {
                    "dtype": str(buffer.param_dtype).removeprefix("torch."),
                    "numel": int(buffer.numel),
                    "buckets": [
                        {"start": start, "end": end, "numel_unpadded": int(bucket.numel_unpadded)}
                        for (start, end), bucket in zip(
                            buffer.bucket_indices, buffer.buckets, strict=True
                        )
                    ],
                    "params": {
                        names[param]: list(span) for param, span in buffer.param_index_map.items()
                    },
                }
                for buffer in leaf.buffers
            ]
            for leaf in leaves
        ],
    }
