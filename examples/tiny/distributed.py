"""Saves and loads checkpoints of format torch_dist by megatron-core's own dist_checkpointing, as
Megatron-LM calls it.

The order of steps is that of megatron/training/checkpointing.py (core_r0.8.0 to core_r0.16.0): all
ranks write into one folder, in parallel over data-parallel ranks too (--ckpt-fully-parallel-save,
the default)."""

from __future__ import annotations

import argparse
import inspect
import queue
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from examples.tiny.model import known
from examples.tiny.model import load as load_model
from examples.tiny.unique import leaf_optimizers


def save(
    folder: Path, state: dict[str, Any], sharding: dict[str, Any], fully_parallel: bool
) -> None:
    """Collective over all ranks. `fully_parallel`: what data-parallel ranks have in common is
    divided among them."""
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )

    _fit_to_this_torch()
    _write_in_threads()
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    strategy = get_default_save_sharded_strategy("torch_dist")
    if fully_parallel:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(strategy, group)
    content = {name: value for name, value in sharding.items() if name != "dp_cp_group"}
    dist_checkpointing.save(
        state, str(folder), strategy, **known(dist_checkpointing.save, content_metadata=content)
    )


def load(
    folder: Path,
    options: argparse.Namespace,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
) -> dict[str, Any]:
    """Load model, optimizer and scheduler in whatever layout this run has; random generators stay
    as they are. Collective.

    Returns what all ranks have in common. The optimizer is loaded as it was saved, by what the
    checkpoint says of itself."""
    saved = dist_checkpointing.load_common_state_dict(str(folder))
    metadata = sharding(options) | saved.get("content_metadata", {})
    state: dict[str, Any] = model_states(chunks, metadata)
    if "optimizer" in saved:
        state["optimizer"] = optimizer_state(optimizer, state, metadata, is_loading=True)
    loaded = dist_checkpointing.load(state, str(folder))
    for name, chunk in zip(model_states(chunks, metadata), chunks, strict=True):
        load_model(chunk, loaded[name])
    if "optimizer" in saved:
        optimizer.load_state_dict(loaded["optimizer"])
    if (
        scheduler is not None and "opt_param_scheduler" in saved
    ):  # wheels up to 0.11 have no scheduler to save
        scheduler.load_state_dict(saved["opt_param_scheduler"])
    return saved


def model_states(chunks: list[torch.nn.Module], sharding: dict[str, Any]) -> dict[str, Any]:
    """By the keys of a checkpoint, the sharded state dict of each chunk."""
    states = {}
    for index, chunk in enumerate(chunks):
        if len(chunks) > 1 and hasattr(parallel_state, "set_virtual_pipeline_model_parallel_rank"):
            parallel_state.set_virtual_pipeline_model_parallel_rank(index)
        states["model" if len(chunks) == 1 else f"model{index}"] = chunk.sharded_state_dict(
            metadata=sharding
        )
    return states


def sharding(options: argparse.Namespace) -> dict[str, Any]:
    """As _build_sharded_state_dict_metadata() of core_r0.16.0 makes it; earlier releases take the
    sharding type alone."""
    return {
        "distrib_optim_sharding_type": options.dist_optim,
        "singleton_local_shards": False,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def optimizer_state(
    optimizer: Any, state: dict[str, Any], sharding: dict[str, Any], is_loading: bool = False
) -> Any:
    """By metadata from 0.15 on, by keyword before; a chained optimizer takes any keyword and passes
    it on."""
    options = known(leaf_optimizers(optimizer)[0].sharded_state_dict, metadata=sharding)
    if not options:
        options = {"sharding_type": sharding["distrib_optim_sharding_type"]}
    return optimizer.sharded_state_dict(state, is_loading, **options)


def rng_state(states: list[dict[str, Any]]) -> Any:
    """As get_rng_state() of core_r0.16.0 does it without expert parallelism."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return ShardedObject(
        "rng_state",
        states,
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
        ),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def _fit_to_this_torch() -> None:
    """Up to 0.13 megatron-core writes items by a private function of torch, which takes one
    argument more from 2.8 on."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint import filesystem

    if "serialization_format" in inspect.signature(filesystem._write_item).parameters and (
        "serialization_format" not in inspect.getsource(filesystem_async)
    ):
        filesystem_async._write_item = lambda *item: filesystem._write_item(
            *item, filesystem.SerializationFormat.TORCH_SAVE
        )


def _write_in_threads() -> None:
    """megatron-core forks its writers, which can hang where gloo has threads, and spawns a process
    for what they answer."""
    from megatron.core.dist_checkpointing.strategies import base, filesystem_async

    threads = SimpleNamespace(
        Queue=queue.Queue, JoinableQueue=queue.Queue, Process=threading.Thread
    )
    threads.Manager = lambda: threads
    filesystem_async.mp = SimpleNamespace(get_context=lambda kind: threads)
    base.AsyncSaveShardedStrategy.save = lambda self, state, folder: self.async_save(
        state, folder
    ).execute_sync()
