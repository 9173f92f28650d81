"""Makes every element of the fp32 main weights and of both moments unique, so that no swap can go
unseen.

Each element of the whole model has an id: its place in a list of all parameters, the same on every
rank. The low bits of its fp32 mantissa are replaced by that id, scrambled, another way for each
role; sign, exponent and the high bits of the mantissa stay as trained. So two elements of one role
are never equal, unless they are copies of one another: a parameter replicated over tp, the tied
embedding on the last stage."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

MANTISSA_BITS = 23
#: odd, so that multiplying by it modulo a power of two loses nothing
SCRAMBLE = {"main": 0x9E3779B1, "exp_avg": 0x85EBCA77, "exp_avg_sq": 0xC2B2AE3D}
#: a moment that is exactly zero, such as that of a token never seen, has no exponent to keep
SMALLEST = 2.0**-60
TIED = ("embedding.word_embeddings.weight", "output_layer.weight")


class ElementIds(NamedTuple):
    """`first[param]` is the id of a parameter's element 0; all ids fit in `bits`."""

    first: dict[torch.nn.Parameter, int]
    bits: int


class Shard(NamedTuple):
    """What this dp rank's optimizer owns of a parameter: elements start to stop, as fp32 main
    weight and moments."""

    param: torch.nn.Parameter
    start: int
    stop: int
    main: torch.Tensor
    state: dict[str, torch.Tensor]


def leaf_optimizers(optimizer: Any) -> list[Any]:
    """The DistributedOptimizers in a chain; those without parameters (experts elsewhere) are left
    out."""
    leaves = getattr(optimizer, "chained_optimizers", [optimizer])
    return [leaf for leaf in leaves if not getattr(leaf, "is_stub_optimizer", False)]


def shards(leaf: Any) -> Iterator[Shard]:
    """Every shard of one DistributedOptimizer.

    Pairs model and main parameters as the optimizer step does (its groups of model and shard
    parameters), not as the save does (model_param_group_index_map), which is wrong where fp32 and
    bf16 share a param group."""
    for models, mains in (
        (leaf.model_float16_groups, leaf.shard_fp32_from_float16_groups),
        (leaf.model_fp32_groups, leaf.shard_fp32_groups),
    ):
        for model_group, main_group in zip(models, mains, strict=True):
            for param, main in zip(model_group, main_group, strict=True):
                span = leaf._get_model_param_range_map(param)["param"]
                yield Shard(param, span.start, span.end, main, leaf.optimizer.state[main])


def element_ids(chunks: list[torch.nn.Module], args: argparse.Namespace) -> ElementIds:
    """Number the elements of the whole model; every rank computes the same numbers. Collective over
    all ranks."""
    keys = {
        param: _key(index, name, param, args)
        for index, chunk in enumerate(chunks)
        for name, param in chunk.named_parameters()
    }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {key: param.numel() for param, key in keys.items()})
    sizes = {key: numel for part in gathered for key, numel in part.items()}
    first, total = {}, 0
    for key in sorted(sizes):
        first[key] = total
        total += sizes[key]
    bits = max(16, (total - 1).bit_length())
    if bits >= MANTISSA_BITS:
        raise SystemExit(
            f"{total:,} parameters are too many to tell apart; choose fewer --layers, a smaller "
            f"--hidden"
        )
    return ElementIds({param: first[key] for param, key in keys.items()}, bits)


def _key(
    chunk: int, name: str, param: torch.nn.Parameter, args: argparse.Namespace
) -> tuple[Any, ...]:
    """Equal for copies of one tensor, different for everything else."""
    tp = (
        parallel_state.get_tensor_model_parallel_rank()
        if getattr(param, "tensor_model_parallel", False)
        else 0
    )
    ep = (
        parallel_state.get_expert_model_parallel_rank()
        if not getattr(param, "allreduce", True)
        else 0
    )
    if name in TIED and not args.untie_embeddings_and_output_weights:
        return ("tied", -1, -1, tp, ep)
    return (name, parallel_state.get_pipeline_model_parallel_rank(), chunk, tp, ep)


def stamp_main(optimizer: Any, ids: ElementIds) -> None:
    """Before an optimizer step, which then writes the model's weights from them."""
    for leaf in leaf_optimizers(optimizer):
        for shard in shards(leaf):
            _stamp(shard.main, ids.first[shard.param] + shard.start, ids.bits, "main")


def stamp_moments(optimizer: Any, ids: ElementIds) -> None:
    """After the last optimizer step, which would mix them again."""
    for leaf in leaf_optimizers(optimizer):
        for shard in shards(leaf):
            for role in ("exp_avg", "exp_avg_sq"):
                _stamp(shard.state[role], ids.first[shard.param] + shard.start, ids.bits, role)


def _stamp(values: torch.Tensor, first: int, bits: int, role: str) -> None:
    """Replace the low `bits` of each fp32 element, in place, by its scrambled id."""
    flat = values.detach().view(-1)
    flat[flat.abs() < SMALLEST] = SMALLEST
    raw = flat.view(torch.int32)
    mask = (1 << bits) - 1
    ids = torch.arange(first, first + flat.numel(), dtype=torch.int64)
    raw.copy_((raw & ~mask) | (ids * SCRAMBLE[role] & mask).to(torch.int32))
