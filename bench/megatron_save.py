"""What each rank of a Megatron-LM run saves: its folder, the structure of its two files, and its
sidecar.

In torch format with the distributed optimizer, as Megatron-LM core 0.8 to 0.17 does it
(training/checkpointing.py, core/optimizer/distrib_optimizer.py,
core/distributed/param_and_grad_buffer.py): buckets coalesced and unpadded, float32 states, bfloat16
model weights that are the cast of the main weights and views of one flat buffer. The sidecar is
what the hook writes. The values are the caller's; bench/check_input.py compares the rest with what
Megatron-LM itself saved."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ITERATION = 1000
STATES = ("param", "exp_avg", "exp_avg_sq")
PARAM_ALIGNMENT, BUCKET_ALIGNMENT, BUCKET_SIZE = 64, 128, 40_000_000
ROWS, COLS, WHOLE = 0, 1, -1
DENSE, EXPERT = "dense", "expert"


@dataclass(frozen=True, slots=True)
class Model:
    """A GPT with LayerNorm, biases, GELU, learned positions and tied embeddings; `vocab` is the
    padded size.

    With experts: each layer a mixture of gated ones, RMSNorm, rotary positions, no biases, an
    output layer of its own."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    positions: int
    bucket_size: int = BUCKET_SIZE
    ffn: int | None = None
    groups: int | None = None
    kv_channels: int | None = None
    experts: int = 0

    def facts(self) -> dict:
        """The sizes by the names of Megatron-LM's arguments."""
        mixture = self.experts > 0
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn or 4 * self.hidden,
            "num_attention_heads": self.heads,
            "num_query_groups": self.groups or self.heads,
            "kv_channels": self.kv_channels or self.hidden // self.heads,
            "padded_vocab_size": self.vocab,
            "vocab_size": self.vocab,
            "make_vocab_size_divisible_by": 128,
            "swiglu": mixture,
            "max_position_embeddings": self.positions,
            "position_embedding_type": "rope" if mixture else "learned_absolute",
            "normalization": "RMSNorm" if mixture else "LayerNorm",
            "add_bias_linear": not mixture,
            "num_experts": self.experts or None,
            "untie_embeddings_and_output_weights": mixture,
        }


class Rank(NamedTuple):
    """A rank that has a folder of its own."""

    tp: int
    pp: int
    ep: int


@dataclass(frozen=True, slots=True)
class Grid:
    """The parallel sizes of a run; `stage_layers` counts each stage's layers where that is uneven
    (then vpp is 1)."""

    tp: int
    pp: int
    vpp: int = 1
    ep: int = 1
    dp: int = 1
    stage_layers: tuple[int, ...] = ()

    def ranks(self) -> Iterator[Rank]:
        return map(Rank._make, itertools.product(range(self.tp), range(self.pp), range(self.ep)))

    def suffix(self, rank: Rank) -> str:
        return f"{rank.tp:02d}_{rank.pp:03d}" + (f"_{rank.ep:03d}" if self.ep > 1 else "")

    def layers(self, model: Model, pp: int, vpp: int) -> range:
        """The global numbers of the layers in a chunk: all stages' chunk 0 come first, then all
        stages' chunk 1 …"""
        counts = [
            count // self.vpp for count in self.stage_layers or [model.layers // self.pp] * self.pp
        ] * self.vpp
        first = sum(counts[: vpp * self.pp + pp])
        return range(first, first + counts[pp])

    def is_last(self, pp: int, vpp: int) -> bool:
        return (pp, vpp) == (self.pp - 1, self.vpp - 1)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One rank's tensor: its key in the model file, local shape, and the dimension that tensor
    parallelism cuts."""

    name: str
    shape: tuple[int, ...]
    partition_dim: int = WHOLE
    tied: bool = False
    kind: str = DENSE
    stride: int = 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a parameter lies in the padded buffer."""

    parameter: Parameter
    start: int
    end: int
    bucket: int


@dataclass(frozen=True, slots=True)
class Buffer:
    """A chunk's flat buffer of one optimizer."""

    chunk: int
    slots: list[Slot]
    buckets: list[dict[str, int]]

    @property
    def numel(self) -> int:
        return self.buckets[-1]["end"]


def parameters(model: Model, grid: Grid, pp: int, vpp: int) -> list[Parameter]:
    """The parameters of a chunk on each of stage `pp`'s ranks, in the order of
    named_parameters()."""
    vocab, tied = (model.vocab // grid.tp, model.hidden), not model.experts
    found = []
    if (pp, vpp) == (0, 0):
        found.append(Parameter("embedding.word_embeddings.weight", vocab, ROWS, tied))
        if not model.experts:
            found.append(
                Parameter("embedding.position_embeddings.weight", (model.positions, model.hidden))
            )
    for local in range(len(grid.layers(model, pp, vpp))):
        found += _layer(f"decoder.layers.{local}.", model, grid)
    if grid.is_last(pp, vpp):
        found += [
            *_norm("decoder.final_layernorm.", model),
            Parameter("output_layer.weight", vocab, ROWS, tied),
        ]
    return found


def _layer(prefix: str, model: Model, grid: Grid) -> Iterator[Parameter]:
    facts, h = model.facts(), model.hidden
    heads = model.heads * facts["kv_channels"] // grid.tp
    groups = facts["num_query_groups"] * facts["kv_channels"] // grid.tp
    yield from _norm(prefix + "input_layernorm.", model)
    yield from _linear(prefix + "self_attention.linear_proj", (h, heads), COLS, model)
    yield from _linear(prefix + "self_attention.linear_qkv", (heads + 2 * groups, h), ROWS, model)
    yield from _norm(prefix + "pre_mlp_layernorm.", model)
    ffn = facts["ffn_hidden_size"] // grid.tp
    if not model.experts:
        yield from _linear(prefix + "mlp.linear_fc1", (ffn, h), ROWS, model)
        yield from _linear(prefix + "mlp.linear_fc2", (h, ffn), COLS, model)
        return
    yield Parameter(prefix + "mlp.router.weight", (model.experts, h))
    kind = EXPERT if grid.ep > 1 else DENSE
    for local in range(model.experts // grid.ep):
        expert = f"{prefix}mlp.experts.local_experts.{local}."
        yield Parameter(expert + "linear_fc1.weight", (2 * ffn, h), ROWS, kind=kind, stride=2)
        yield Parameter(expert + "linear_fc2.weight", (h, ffn), COLS, kind=kind)


def _norm(prefix: str, model: Model) -> list[Parameter]:
    return [
        Parameter(prefix + name, (model.hidden,))
        for name in (("weight",) if model.experts else ("weight", "bias"))
    ]


def _linear(
    module: str, shape: tuple[int, int], partition_dim: int, model: Model
) -> Iterator[Parameter]:
    yield Parameter(f"{module}.weight", shape, partition_dim)
    if not model.experts:
        yield Parameter(f"{module}.bias", shape[:1], ROWS if partition_dim == ROWS else WHOLE)


def lay_out(model: Model, grid: Grid, pp: int, vpp: int, kind: str = DENSE) -> Buffer:
    """A flat buffer: parameters in reverse order, each start aligned, a bucket closed once it is
    large enough.

    Only the first stage's first chunk is cut by size; a tied embedding has a bucket of its own
    (core 0.8 … 0.17)."""
    slots: list[Slot] = []
    buckets: list[dict[str, int]] = []
    bucket_start = end = 0
    alignment = math.lcm(BUCKET_ALIGNMENT, optimizer_ranks(grid, kind))

    def close() -> int:
        buckets.append(
            {
                "start": bucket_start,
                "end": _aligned(end, alignment),
                "numel_unpadded": end - bucket_start,
            }
        )
        return buckets[-1]["end"]

    for parameter in reversed(
        [one for one in parameters(model, grid, pp, vpp) if one.kind == kind]
    ):
        if parameter.tied and end > bucket_start:
            bucket_start = end = close()
        start = _aligned(end, PARAM_ALIGNMENT)
        end = start + parameter.numel
        slots.append(Slot(parameter, start, end, len(buckets)))
        if parameter.tied or ((pp, vpp) == (0, 0) and end - bucket_start >= model.bucket_size):
            bucket_start = end = close()
    if end > bucket_start:
        close()
    return Buffer(vpp, slots, buckets)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def optimizer_ranks(grid: Grid, kind: str) -> int:
    """How many ranks share an optimizer's state."""
    return grid.dp // grid.ep if kind == EXPERT else grid.dp


def kinds(grid: Grid) -> tuple[str, ...]:
    """The optimizers of the chain."""
    return (DENSE, EXPERT) if grid.ep > 1 else (DENSE,)


def write(
    model: Model, grid: Grid, save: Path, values: Callable[[str, Rank, Buffer], torch.Tensor]
) -> None:
    """Write the checkpoint as save folder `save`; `values` gives a buffer's state, float32 [numel],
    padding included."""
    iteration = save / f"iter_{ITERATION:07d}"
    (iteration / "param_map").mkdir(parents=True)
    for rank in grid.ranks():
        folder = iteration / f"mp_rank_{grid.suffix(rank)}"
        folder.mkdir()
        buffers = {
            kind: [lay_out(model, grid, rank.pp, vpp, kind) for vpp in range(grid.vpp)]
            for kind in kinds(grid)
        }
        states = {
            kind: [
                {state: values(state, rank, buffer) for state in STATES} for buffer in buffers[kind]
            ]
            for kind in buffers
        }
        torch.save(_model_file(model, grid, rank, buffers, states), folder / "model_optim_rng.pt")
        torch.save(_optimizer_file(grid, rank, buffers, states), folder / "distrib_optim.pt")
        place = "_".join(
            axis + number
            for axis, number in zip(("tp", "pp", "ep"), grid.suffix(rank).split("_"), strict=False)
        )
        sidecar = iteration / "param_map" / f"layout_{place}.json"
        sidecar.write_text(json.dumps(_layout(model, grid, rank, buffers)))
    (save / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def _holds(rank: Rank, kind: str) -> bool:
    """Whether the rank writes that optimizer's state: of ranks that share one, the first does."""
    return kind == EXPERT or rank.ep == 0


def _optimizer_file(
    grid: Grid, rank: Rank, buffers: dict, states: dict
) -> dict | list[dict | None]:
    chain = [
        {"buckets_coalesced": True}
        | {
            gbuf: {(torch.bfloat16, torch.float32): _coalesced(buffer, values)}
            for gbuf, (buffer, values) in enumerate(zip(buffers[kind], states[kind], strict=True))
        }
        if _holds(rank, kind)
        else None
        for kind in kinds(grid)
    ]
    return chain if len(chain) > 1 else chain[0]


def _coalesced(buffer: Buffer, states: dict[str, torch.Tensor]) -> dict:
    entry = {
        state: torch.cat(
            [values[b["start"] : b["start"] + b["numel_unpadded"]] for b in buffer.buckets]
        )
        for state, values in states.items()
    }
    entry["numel_unpadded"] = sum(bucket["numel_unpadded"] for bucket in buffer.buckets)
    return entry


def _model_file(model: Model, grid: Grid, rank: Rank, buffers: dict, states: dict) -> dict:
    views: list[dict[str, torch.Tensor]] = [{} for _ in range(grid.vpp)]
    for kind in buffers:
        for buffer, values in zip(buffers[kind], states[kind], strict=True):
            weights = values["param"].bfloat16()
            views[buffer.chunk] |= {
                s.parameter.name: weights[s.start : s.end].view(s.parameter.shape)
                for s in buffer.slots
            }
    chunks = [
        OrderedDict(
            (parameter.name, views[vpp][parameter.name])
            for parameter in parameters(model, grid, rank.pp, vpp)
        )
        for vpp in range(grid.vpp)
    ]
    keys = ["model"] if grid.vpp == 1 else [f"model{vpp}" for vpp in range(grid.vpp)]
    optimizers = [{"optimizer": {"param_groups": _param_groups(kind)}} for kind in kinds(grid)]
    return {
        "args": _args(model, grid, rank),
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        **dict(zip(keys, chunks, strict=True)),
        "optimizer": optimizers if len(optimizers) > 1 else optimizers[0],
        "opt_param_scheduler": _scheduler(),
        "rng_state": [_rng_state()],
        "num_floating_point_operations_so_far": 1.0e18,
    }


def _param_groups(kind: str) -> list[dict]:
    """One group for the weights and one, without weight decay, for what is one-dimensional; experts
    have none of it."""
    return [
        {
            "wd_mult": 1.0 if weight_decay else 0.0,
            "lr_mult": 1.0,
            "is_expert_parallel": kind == EXPERT,
            "is_decoupled_lr": False,
            "max_lr": 3e-4,
            "min_lr": 3e-5,
            "lr": 2.5e-4,
            "bias_correction": True,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": weight_decay,
            "step": ITERATION,
        }
        for weight_decay in ((0.01,) if kind == EXPERT else (0.01, 0.0))
    ]


def _scheduler() -> dict:
    return {
        "max_lr": 3e-4,
        "lr_warmup_steps": 1600.0,
        "num_steps": 8 * ITERATION,
        "lr_decay_style": "cosine",
        "lr_decay_steps": 800_000,
        "min_lr": 3e-5,
        "start_wd": 0.01,
        "end_wd": 0.01,
        "wd_incr_style": "constant",
        "wd_incr_steps": 800_000,
    }


def _rng_state() -> dict:
    trackers = ("data-parallel-rng", "model-parallel-rng", "expert-parallel-rng")
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {name: torch.get_rng_state() for name in trackers},
    }


def _global_rank(grid: Grid, rank: Rank) -> int:
    return (rank.pp * grid.dp + rank.ep) * grid.tp + rank.tp


def _args(model: Model, grid: Grid, rank: Rank) -> argparse.Namespace:
    return argparse.Namespace(
        **model.facts(),
        tensor_model_parallel_size=grid.tp,
        pipeline_model_parallel_size=grid.pp,
        virtual_pipeline_model_parallel_size=grid.vpp if grid.vpp > 1 else None,
        expert_model_parallel_size=grid.ep,
        decoder_first_pipeline_num_layers=grid.stage_layers[0] if grid.stage_layers else None,
        decoder_last_pipeline_num_layers=grid.stage_layers[-1] if grid.stage_layers else None,
        context_parallel_size=1,
        data_parallel_size=grid.dp,
        group_query_attention=model.groups is not None,
        use_distributed_optimizer=True,
        ckpt_format="torch",
        bf16=True,
        params_dtype=torch.bfloat16,
        seq_length=model.positions,
        iteration=ITERATION,
        rank=_global_rank(grid, rank),
        world_size=grid.tp * grid.pp * grid.dp,
    )


def _layout(model: Model, grid: Grid, rank: Rank, buffers: dict[str, list[Buffer]]) -> dict:
    return {
        "schema": "parammap.layout",
        "version": 1,
        "framework": {
            "name": "megatron",
            "core_version": "0.12.0",
            "torch_version": str(torch.__version__),
        },
        "iteration": ITERATION,
        "checkpoint_format": "torch",
        "parallel": {
            "tp": grid.tp,
            "pp": grid.pp,
            "vpp": grid.vpp,
            "ep": grid.ep,
            "etp": grid.tp,
            "cp": 1,
            "dp": grid.dp,
            "order": "tp-cp-ep-dp-pp",
            "world_size": grid.tp * grid.pp * grid.dp,
        },
        "rank": {
            "global": _global_rank(grid, rank),
            "tp": rank.tp,
            "pp": rank.pp,
            "ep": rank.ep,
            "etp": rank.tp,
        },
        "model": model.facts(),
        "chunks": [
            {
                "vpp": vpp,
                "layers": {"decoder.layers": list(grid.layers(model, rank.pp, vpp))},
                "pre_process": (rank.pp, vpp) == (0, 0),
                "post_process": grid.is_last(rank.pp, vpp),
            }
            for vpp in range(grid.vpp)
        ],
        "optimizers": [
            {
                "class": "DistributedOptimizer",
                "kind": kind,
                "data_parallel_size": optimizer_ranks(grid, kind),
                "buffers": [_described_buffer(buffer) for buffer in buffers[kind]],
            }
            if _holds(rank, kind)
            else None
            for kind in kinds(grid)
        ],
    }


def _described_buffer(buffer: Buffer) -> dict:
    return {
        "chunk": buffer.chunk,
        "param_dtype": "bfloat16",
        "grad_dtype": "float32",
        "numel": buffer.numel,
        "buckets": buffer.buckets,
        "params": [_described(slot) for slot in buffer.slots],
    }


def _described(slot: Slot) -> dict:
    parameter = slot.parameter
    return {
        "name": parameter.name,
        "shape": list(parameter.shape),
        "dtype": "bfloat16",
        "start": slot.start,
        "end": slot.end,
        "bucket": slot.bucket,
        "partition_dim": parameter.partition_dim,
        "partition_stride": parameter.stride,
        "tensor_parallel": parameter.partition_dim != WHOLE,
        "tied": parameter.tied,
        "expert": parameter.kind == EXPERT,
        "sequence_parallel": False,
    }
