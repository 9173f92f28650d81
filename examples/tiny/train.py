"""One rank of a tiny training run: set up or resume, train, make every element unique (or not),
save."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import package_info, parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from examples.tiny import context, live_state, losses, model, resume, save, unique
from examples.tiny.losses import Losses, Step
from examples.tiny.options import megatron_args, micro_batches

#: the number of the batch that is evaluated, the same in all runs
NEVER_TRAINED = -1


def run_rank(rank: int, options: argparse.Namespace, store: Path) -> None:
    """What process `rank` of all does; `store` is a file through which the ranks find each
    other."""
    args = megatron_args(options, rank)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(args.world_size),
        LOCAL_WORLD_SIZE=str(args.world_size),
    )
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=args.world_size
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        context_parallel_size=options.cp,
        expert_model_parallel_size=options.ep,
    )
    torch.manual_seed(options.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(options.seed)

    _, wrapped, optimizer = model.build(args, options)
    scheduler = save.param_scheduler(args, optimizer)
    chunks = [model.unwrap(chunk) for chunk in wrapped]

    def record(folder: str, trained: list[Step]) -> None:
        live_state.write(
            options.out / folder, args, chunks, optimizer, scheduler, package_info.__version__
        )
        if options.plain:
            losses.write(options.out / folder, trained, evaluate(args, options, wrapped))

    def steps(first: int, last: int) -> list[Step]:
        return train(args, options, wrapped, optimizer, scheduler, range(first, last))

    first_step = 0
    if options.resume:
        first_step = resume.load_checkpoint(options, chunks, optimizer, scheduler)
        record("resumed", [])
    trained = steps(first_step, options.steps)
    save.save_checkpoint(args, options, chunks, optimizer, scheduler)
    record("truth", trained)
    if options.further_steps:
        record("further", steps(options.steps, options.steps + options.further_steps))
    dist.barrier()
    dist.destroy_process_group()


def train(
    args: argparse.Namespace,
    options: argparse.Namespace,
    wrapped: list[Any],
    optimizer: Any,
    scheduler: Any,
    steps: range,
) -> list[Step]:
    """Returns what each step computed; losses are known on the last stage.

    Unless the run is plain, the last step only publishes fp32 main weights that were made unique
    (see unique.py)."""
    ids = (
        None
        if options.plain
        else unique.element_ids([model.unwrap(chunk) for chunk in wrapped], args)
    )
    done = []
    for step in steps:
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        batch = run_batch(args, options, wrapped, step)
        frozen = ids is not None and step == steps[-1]
        if frozen:
            unique.stamp_main(optimizer, ids)
        success, grad_norm, _ = step_optimizer(optimizer, frozen)
        if not success:
            raise RuntimeError(
                f"rank {args.rank}: the optimizer skipped step {step}; gradients overflowed"
            )
        if scheduler is not None:
            scheduler.step(increment=args.global_batch_size)
        done.append(Step(batch, float(grad_norm)))
        if (
            batch
            and parallel_state.get_tensor_model_parallel_rank()
            == parallel_state.get_data_parallel_rank()
            == 0
        ):
            mean = sum(float(loss["lm"]) for loss in batch) / len(batch)
            print(
                f"rank {args.rank} step {step} loss {mean:.4f} grad norm {grad_norm:.3f}",
                flush=True,
            )
    if ids is not None:
        unique.stamp_moments(optimizer, ids)
    return done


def evaluate(args: argparse.Namespace, options: argparse.Namespace, wrapped: list[Any]) -> Losses:
    """The losses of a batch that no step has, by the model as it is; the model is in training mode
    again afterwards."""
    for chunk in wrapped:
        chunk.eval()
    with torch.no_grad():
        result = run_batch(args, options, wrapped, NEVER_TRAINED, forward_only=True)
    for chunk in wrapped:
        chunk.train()
    return result


def run_batch(
    args: argparse.Namespace,
    options: argparse.Namespace,
    wrapped: list[Any],
    step: int,
    forward_only: bool = False,
) -> Losses:
    """One global batch through Megatron's schedule; on the last stage, what `forward_step` says of
    each micro-batch."""
    data = [tokens(args, step) for _ in wrapped]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data if len(wrapped) > 1 else data[0],
        model=wrapped if len(wrapped) > 1 else wrapped[0],
        num_microbatches=micro_batches(options),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.seq_length,
        forward_only=forward_only,
    )


def step_optimizer(optimizer: Any, frozen: bool) -> tuple[bool, float, Any]:
    """Megatron's own step; frozen: at learning rate 0, which leaves main weights as they are and
    publishes them."""
    rates = [group["lr"] for group in optimizer.param_groups]
    if frozen:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    result = optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return result


def tokens(args: argparse.Namespace, step: int) -> Iterator[torch.Tensor]:
    """Micro-batches of random tokens of the true vocabulary. A step's are the same in every layout;
    the dp ranks take them in turn."""
    size, rank = args.data_parallel_size, parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(args.seed + 1 + step)
    for number in itertools.count():
        batch = torch.randint(
            0, args.vocab_size, (args.micro_batch_size, args.seq_length + 1), generator=generator
        )
        if number % size == rank:
            yield batch


def forward_step(data: Iterator[torch.Tensor], chunk: Any) -> tuple[torch.Tensor, Any]:
    """The forward step that Megatron's pipeline schedules call."""
    tokens = next(data)
    length = tokens.shape[1] - 1
    mask = torch.triu(torch.ones(length, length), 1).bool()[None, None]
    positions = torch.arange(length)[None].expand(tokens.shape[0], -1)
    batch = context.part(
        {"tokens": tokens[:, :-1], "position_ids": positions, "labels": tokens[:, 1:]}
    )
    output = chunk(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mean = output.float().mean() / parallel_state.get_context_parallel_world_size()
        each = context.whole(output.detach(), batch["position_ids"])
        return mean, {"lm": each.float().mean(), "tokens": tokens, "each": each}

    return output, loss
