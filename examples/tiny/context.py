"""The sequence as the ranks of context parallelism share it; with one rank, as it is."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state, utils


def part(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's part of [batch, sequence] tensors, as Megatron-LM's own data loaders cut it."""
    if parallel_state.get_context_parallel_world_size() > 1:
        batch = utils.get_batch_on_this_cp_rank(batch)
    return {name: tensor.contiguous() for name, tensor in batch.items()}


def whole(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[batch, sequence] put together from all ranks' parts, by the positions of each. Collective
    over their group."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return values
    parts = [[torch.empty_like(tensor) for _ in range(size)] for tensor in (values, positions)]
    for gathered, tensor in zip(parts, (values.contiguous(), positions), strict=True):
        dist.all_gather(gathered, tensor, group=parallel_state.get_context_parallel_group())
    joined, places = (torch.cat(gathered, 1) for gathered in parts)
    return torch.empty_like(joined).scatter_(1, places, joined)
