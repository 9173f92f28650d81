"""Saves a checkpoint the way Megatron-LM's megatron/training/checkpointing.py does (core_r0.6.0
on).

The wheels of megatron-core hold no training code, so the order of its steps is followed here.
Format torch: distrib_optim.pt by the optimizer itself, then the hook, then model_optim_rng.pt, then
the tracker file. Format torch_dist: the hook, everything by megatron-core's dist_checkpointing,
then the tracker file."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from examples.tiny import distributed

try:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
except (
    ModuleNotFoundError
):  # up to 0.11 it is part of Megatron-LM's training code, which the wheel lacks
    OptimizerParamScheduler = None


def param_scheduler(args: argparse.Namespace, optimizer: Any) -> Any | None:
    """Megatron's own scheduler; None in a release whose wheel has none, and then the checkpoint has
    none either."""
    if OptimizerParamScheduler is None:
        return None
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=0,
        lr_decay_steps=args.lr_decay_iters * args.global_batch_size,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay,
        end_wd=args.end_weight_decay,
        wd_incr_steps=args.train_iters * args.global_batch_size,
        wd_incr_style=args.weight_decay_incr_style,
    )


def is_first_of_expert_data_parallel() -> bool:
    """Whether this rank writes a model file."""
    name = "get_expert_data_parallel_rank"
    if not hasattr(parallel_state, name):  # up to 0.8
        name = "get_data_modulo_expert_parallel_rank"
    return getattr(parallel_state, name)() == 0


def rank_folder(options: argparse.Namespace, root: Path, tracked: str) -> Path:
    """root/iter_{tracked:07}/mp_rank_TT[_PPP][_EEE] of this rank, or of a release instead of an
    iteration."""
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02}"
    if options.pp > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03}"
    if options.ep > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03}"
    return root / (f"iter_{int(tracked):07}" if tracked.isdigit() else tracked) / name


def save_checkpoint(
    args: argparse.Namespace,
    options: argparse.Namespace,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
) -> None:
    """Write this rank's part of the checkpoint; `chunks` are unwrapped. Collective over all
    ranks."""
    if options.ckpt_format == "torch_dist":
        folder = options.out / f"iter_{options.steps:07}"
        _call_hook(args, options, chunks, optimizer, str(folder))
        sharding = distributed.sharding(options)
        distributed.save(
            folder,
            state_dict(args, options, chunks, optimizer, scheduler, sharding),
            sharding,
            not options.no_ckpt_fully_parallel_save,
        )
    else:
        _save_torch(args, options, chunks, optimizer, scheduler)
    dist.barrier()
    if dist.get_rank() == 0:
        (options.out / "latest_checkpointed_iteration.txt").write_text(str(options.steps))


def _save_torch(
    args: argparse.Namespace,
    options: argparse.Namespace,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
) -> None:
    folder = rank_folder(options, options.out, str(options.steps))
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint_name = str(folder / "model_optim_rng.pt")
    optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))
    _call_hook(args, options, chunks, optimizer, checkpoint_name)
    if is_first_of_expert_data_parallel():
        torch.save(state_dict(args, options, chunks, optimizer, scheduler), checkpoint_name)


def _call_hook(
    args: argparse.Namespace,
    options: argparse.Namespace,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    checkpoint_name: str,
) -> None:
    if not options.no_hook:
        from parammap.hooks.param_map import save_param_map

        save_param_map(
            None if options.no_args else args, options.steps, chunks, optimizer, checkpoint_name
        )


def state_dict(
    args: argparse.Namespace,
    options: argparse.Namespace,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    sharding: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of model_optim_rng.pt, keys in Megatron-LM's order; with `sharding`, what
    torch_dist saves."""
    result: dict[str, Any] = {} if options.no_args else {"args": args}
    result |= {"checkpoint_version": 3.0, "iteration": options.steps}
    for index, chunk in enumerate(chunks):
        if len(chunks) > 1 and hasattr(parallel_state, "set_virtual_pipeline_model_parallel_rank"):
            parallel_state.set_virtual_pipeline_model_parallel_rank(index)
        result["model" if len(chunks) == 1 else f"model{index}"] = (
            chunk.sharded_state_dict(metadata=sharding)
            if sharding
            else chunk.state_dict_for_save_checkpoint()
        )
    result["optimizer"] = (
        distributed.optimizer_state(optimizer, result, sharding)
        if sharding
        else optimizer.state_dict()
    )
    if scheduler is not None:
        result["opt_param_scheduler"] = scheduler.state_dict()
    rng_state = [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.cuda.get_rng_state(),
            "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
        }
    ]
    result["rng_state"] = distributed.rng_state(rng_state) if sharding else rng_state
    tokens = args.consumed_train_samples * args.seq_length
    result["num_floating_point_operations_so_far"] = (
        72 * args.num_layers * args.hidden_size**2 * tokens
    )
    return result
