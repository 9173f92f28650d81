"""Loads a checkpoint the way Megatron-LM's megatron/training/checkpointing.py does (torch format,
core_r0.6.0 on).

The wheels of megatron-core hold no training code, so the order of its steps is followed here:
model, optimizer without its tensors, distrib_optim.pt by the optimizer itself, scheduler, random
generators."""

from __future__ import annotations

import argparse
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from examples.tiny import distributed, model
from examples.tiny.save import rank_folder


def load_checkpoint(
    options: argparse.Namespace, chunks: list[torch.nn.Module], optimizer: Any, scheduler: Any
) -> int:
    """Load this rank's part of the latest checkpoint in `options.resume`; returns its iteration.
    Collective.

    Raises what torch and megatron-core raise where anything is missing or does not fit; nothing is
    left as it was."""
    tracked = (options.resume / "latest_checkpointed_iteration.txt").read_text().strip()
    folder = rank_folder(options, options.resume, tracked)
    if (folder.parent / ".metadata").is_file():  # format torch_dist
        return distributed.load(folder.parent, options, chunks, optimizer, scheduler)["iteration"]
    saved = torch.load(folder / "model_optim_rng.pt", map_location="cpu", weights_only=False)
    for index, chunk in enumerate(chunks):
        if len(chunks) > 1 and hasattr(parallel_state, "set_virtual_pipeline_model_parallel_rank"):
            parallel_state.set_virtual_pipeline_model_parallel_rank(index)
        model.load(chunk, saved["model" if len(chunks) == 1 else f"model{index}"])
    if "optimizer" not in saved:  # weights alone: the optimizer starts anew
        optimizer.reload_model_params()
        return saved["iteration"]
    optimizer.load_state_dict(saved["optimizer"])
    with torch.no_grad():  # fp32 parameters are copied into views of themselves
        optimizer.load_parameter_state(str(folder / "distrib_optim.pt"))
    if scheduler is not None:
        scheduler.load_state_dict(saved["opt_param_scheduler"])
    set_generators(saved["rng_state"][0])
    dist.barrier()
    return saved["iteration"]


def set_generators(states: dict[str, Any]) -> None:
    random.setstate(states["random_rng_state"])
    np.random.set_state(states["np_rng_state"])
    torch.set_rng_state(states["torch_rng_state"])
    torch.cuda.set_rng_state(states["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["rng_tracker_states"])
