"""torch.distributed as Megatron calls it for NCCL, done by gloo."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

Group = Any  # dist.ProcessGroup, or None for the world


class Done:
    """The handle of a collective that has already run."""

    def wait(self, *args: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def __enter__(self) -> Done:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass


def _handle(async_op: bool) -> Done | None:
    return Done() if async_op else None


def reduce_scatter(
    output: torch.Tensor,
    input: torch.Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    **kwargs: Any,
) -> Done | None:
    """gloo has none: all-reduce a copy in fp32 and take this rank's part; Megatron lets output
    alias input."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    total = input.detach().clone().view(-1).float()
    if size > 1:
        _all_reduce(total, group=group)
    if op == dist.ReduceOp.AVG:
        total /= size
    output.data.view(-1).copy_(total[rank * output.numel() : (rank + 1) * output.numel()])
    return _handle(async_op)


def all_gather_into_tensor(
    output: torch.Tensor,
    input: torch.Tensor,
    group: Group = None,
    async_op: bool = False,
    **kwargs: Any,
) -> Done | None:
    """Through gloo's all_gather of a list; the input is copied because it may lie inside the
    output."""
    part = input.detach().clone().contiguous().view(-1)
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part, group=group)
    output.data.view(-1).copy_(torch.cat(parts))
    return _handle(async_op)


def all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: Group = None,
    async_op: bool = False,
) -> Done | None:
    """gloo has none for every dtype: gather what everyone sends, take what is sent here."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    splits = [int(n) for n in input_split_sizes or [input.shape[0] // size] * size]
    sent: list[Any] = [None] * size
    dist.all_gather_object(
        sent, [part.clone() for part in torch.split(input.detach(), splits)], group=group
    )
    output.data.copy_(torch.cat([parts[rank] for parts in sent]).view_as(output))
    return _handle(async_op)


def all_reduce(
    tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Group = None, async_op: bool = False
) -> Any:
    """gloo has no AVG: sum, then divide."""
    if op != dist.ReduceOp.AVG:
        return _all_reduce(tensor, op=op, group=group, async_op=async_op)
    _all_reduce(tensor, group=group)
    tensor /= dist.get_world_size(group)
    return _handle(async_op)


def isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """gloo reads the tensor later, but Megatron frees an activation once it is sent: send a
    copy."""
    return _isend(tensor.detach().clone(), *args, **kwargs)


def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
    """gloo, whatever backend was asked for; its options and device are NCCL's."""
    for name in ("device_id", "pg_options"):
        kwargs.pop(name, None)
    _init_process_group("gloo", *args, **kwargs)


def new_group(
    ranks: list[int] | None = None,
    timeout: Any = None,
    backend: str | None = None,
    pg_options: Any = None,
    **kwargs: Any,
) -> Any:
    """gloo, whatever backend was asked for; its options and device are NCCL's."""
    kwargs.pop("device_id", None)
    return _new_group(ranks, timeout, "gloo", **kwargs)


def barrier(group: Group = None, async_op: bool = False, device_ids: Any = None) -> Any:
    """gloo refuses device_ids."""
    return _barrier(group=group, async_op=async_op)


def coalescing_manager(*args: Any, **kwargs: Any) -> Done:
    """gloo cannot coalesce: every collective inside has run when the block ends."""
    return Done()


_all_reduce, _isend, _barrier = dist.all_reduce, dist.isend, dist.barrier
_init_process_group, _new_group = dist.init_process_group, dist.new_group

REPLACEMENTS = {
    "reduce_scatter_tensor": reduce_scatter,
    "_reduce_scatter_base": reduce_scatter,
    "all_gather_into_tensor": all_gather_into_tensor,
    "_all_gather_base": all_gather_into_tensor,
    "all_to_all_single": all_to_all_single,
    "all_reduce": all_reduce,
    "isend": isend,
    "init_process_group": init_process_group,
    "new_group": new_group,
    "barrier": barrier,
    "_coalescing_manager": coalescing_manager,
}


def install() -> None:
    """Patch torch.distributed in place, and the module it re-exports from, which Megatron also
    reads."""
    for name, replacement in REPLACEMENTS.items():
        setattr(dist, name, replacement)
        setattr(c10d, name, replacement)
    if not hasattr(
        dist, "ProcessGroupNCCL"
    ):  # a CPU build of torch; Megatron builds its options before it calls
        options = type(
            "Options",
            (),
            {"__init__": lambda self, **kwargs: setattr(self, "config", types.SimpleNamespace())},
        )
        dist.ProcessGroupNCCL = types.SimpleNamespace(Options=options)
