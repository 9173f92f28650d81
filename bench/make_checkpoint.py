"""Makes the benchmark's input: a Megatron-LM checkpoint of a GPT at tp 2 · pp 2 with random values, of the size asked for.

The files are what Megatron-LM core 0.8 and later save in torch format with the distributed optimizer (training/
checkpointing.py, core/optimizer/distrib_optimizer.py, core/distributed/param_and_grad_buffer.py): buckets coalesced and
unpadded, float32 states, bfloat16 model weights that are the cast of the main weights and views of one flat buffer. The
sidecar is what the hook writes. bench/check_input.py compares all this with a checkpoint that Megatron-LM itself saved.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

TP, PP, ITERATION = 2, 2, 1000
STATES = ("param", "exp_avg", "exp_avg_sq")
BYTES_PER_PARAMETER = 4 * len(STATES)
PARAM_ALIGNMENT, BUCKET_ALIGNMENT, BUCKET_SIZE = 64, 128, 40_000_000
ROWS, COLS, WHOLE = 0, 1, -1


@dataclass(frozen=True, slots=True)
class Model:
    """A GPT with LayerNorm, biases, GELU, learned positions and tied embeddings; `vocab` is the padded size."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    positions: int
    bucket_size: int = BUCKET_SIZE


@dataclass(frozen=True, slots=True)
class Parameter:
    """One rank's tensor: its key in the model file, local shape, and the dimension that tensor parallelism cuts."""

    name: str
    shape: tuple[int, ...]
    partition_dim: int = WHOLE
    tied: bool = False

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


def model_of(nbytes: int) -> Model:
    """A model whose optimizer files hold about `nbytes` in all: four fifths in layers, the vocabulary fills up."""
    hidden = 1024 if nbytes >= 500_000_000 else 256
    wanted = nbytes // BYTES_PER_PARAMETER
    layers = max(2, int(0.8 * wanted / (12 * hidden * hidden)) // PP * PP)
    rest = wanted - _numel(Model(layers, hidden, hidden // 64, 0, hidden))
    granule = 128 * TP
    return Model(layers, hidden, hidden // 64, max(1, round(rest / (2 * hidden) / granule)) * granule, hidden)


def _numel(model: Model) -> int:
    return TP * sum(parameter.numel for pp in range(PP) for parameter in stage(model, pp))


def stage(model: Model, pp: int) -> list[Parameter]:
    """The parameters of a rank of stage `pp`, in the order of named_parameters()."""
    h, vocab = model.hidden, model.vocab // TP
    found = []
    if pp == 0:
        found += [Parameter("embedding.word_embeddings.weight", (vocab, h), ROWS, tied=True),
                  Parameter("embedding.position_embeddings.weight", (model.positions, h))]
    for i in range(model.layers // PP):
        found += _layer(f"decoder.layers.{i}.", h)
    if pp == PP - 1:
        found += [*_norm("decoder.final_layernorm.", h),
                  Parameter("output_layer.weight", (vocab, h), ROWS, tied=True)]
    return found


def _layer(prefix: str, h: int) -> list[Parameter]:
    return [
        *_norm(prefix + "input_layernorm.", h),
        Parameter(prefix + "self_attention.linear_proj.weight", (h, h // TP), COLS),
        Parameter(prefix + "self_attention.linear_proj.bias", (h,)),
        Parameter(prefix + "self_attention.linear_qkv.weight", (3 * h // TP, h), ROWS),
        Parameter(prefix + "self_attention.linear_qkv.bias", (3 * h // TP,), ROWS),
        *_norm(prefix + "pre_mlp_layernorm.", h),
        Parameter(prefix + "mlp.linear_fc1.weight", (4 * h // TP, h), ROWS),
        Parameter(prefix + "mlp.linear_fc1.bias", (4 * h // TP,), ROWS),
        Parameter(prefix + "mlp.linear_fc2.weight", (h, 4 * h // TP), COLS),
        Parameter(prefix + "mlp.linear_fc2.bias", (h,)),
    ]


def _norm(prefix: str, h: int) -> list[Parameter]:
    return [Parameter(prefix + "weight", (h,)), Parameter(prefix + "bias", (h,))]


def lay_out(model: Model, pp: int) -> tuple[list[Slot], list[dict[str, int]]]:
    """The flat buffer: parameters in reverse order, each start aligned, a bucket closed once it is large enough.

    Only the first stage is cut by size; a tied embedding has a bucket of its own (core 0.8 … 0.17, dp 1).
    """
    slots: list[Slot] = []
    buckets: list[dict[str, int]] = []
    bucket_start = end = 0

    def close() -> int:
        buckets.append({"start": bucket_start, "end": _aligned(end, BUCKET_ALIGNMENT),
                        "numel_unpadded": end - bucket_start})
        return buckets[-1]["end"]

    for parameter in reversed(stage(model, pp)):
        if parameter.tied and end > bucket_start:
            bucket_start = end = close()
        start = _aligned(end, PARAM_ALIGNMENT)
        end = start + parameter.numel
        slots.append(Slot(parameter, start, end, len(buckets)))
        if parameter.tied or (pp == 0 and end - bucket_start >= model.bucket_size):
            bucket_start = end = close()
    if end > bucket_start:
        close()
    return slots, buckets


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def make(nbytes: int, folder: Path) -> Path:
    """A save folder with about `nbytes` of optimizer files below `folder`, made at the first call and kept."""
    version = f"{zlib.crc32(Path(__file__).read_bytes()):08x}"
    target = folder / f"megatron_tp{TP}pp{PP}_{nbytes / 1e9:g}GB_{version}"
    if not target.is_dir():
        for old in folder.glob(f"megatron_*_{nbytes / 1e9:g}GB_*"):
            shutil.rmtree(old)
        unfinished = target.with_suffix(".tmp")
        write(model_of(nbytes), unfinished)
        os.rename(unfinished, target)
    return target


def write(model: Model, save: Path) -> None:
    """Write the checkpoint of `model` as save folder `save`."""
    iteration = save / f"iter_{ITERATION:07d}"
    (iteration / "param_map").mkdir(parents=True)
    for pp in range(PP):
        slots, buckets = lay_out(model, pp)
        for tp in range(TP):
            rank = iteration / f"mp_rank_{tp:02d}_{pp:03d}"
            rank.mkdir()
            states = {state: _values(state, tp, slots, buckets) for state in STATES}
            torch.save(_model_file(model, tp, pp, slots, states["param"]), rank / "model_optim_rng.pt")
            torch.save(_optimizer_file(states, buckets), rank / "distrib_optim.pt")
            sidecar = iteration / "param_map" / f"layout_tp{tp:02d}_pp{pp:03d}.json"
            sidecar.write_text(json.dumps(_layout(model, tp, pp, slots, buckets)))
    (save / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


_SCALE = {"param": (1, 0.02), "exp_avg": (1, 1e-4), "exp_avg_sq": (2, 1e-4)}


def _values(state: str, tp: int, slots: list[Slot], buckets: list[dict[str, int]]) -> torch.Tensor:
    """A state's padded buffer, float32 [numel]. What ranks hold in common, and the tied embedding, is equal on them."""
    buffer = torch.zeros(buckets[-1]["end"])
    power, scale = _SCALE[state]
    for slot in slots:
        whose = ("tied" if slot.parameter.tied else slot.parameter.name, state,
                 tp if slot.parameter.partition_dim != WHOLE else None)
        generator = torch.Generator().manual_seed(zlib.crc32(repr(whose).encode()))
        buffer[slot.start:slot.end].normal_(generator=generator).mul_(scale).pow_(power)
    return buffer


def _optimizer_file(states: dict[str, torch.Tensor], buckets: list[dict[str, int]]) -> dict:
    def unpadded(buffer: torch.Tensor) -> torch.Tensor:
        return torch.cat([buffer[b["start"]:b["start"] + b["numel_unpadded"]] for b in buckets])

    entry = {state: unpadded(buffer) for state, buffer in states.items()}
    entry["numel_unpadded"] = sum(bucket["numel_unpadded"] for bucket in buckets)
    return {"buckets_coalesced": True, 0: {(torch.bfloat16, torch.float32): entry}}


def _model_file(model: Model, tp: int, pp: int, slots: list[Slot], main: torch.Tensor) -> dict:
    weights = main.bfloat16()
    views = {slot.parameter.name: weights[slot.start:slot.end].view(slot.parameter.shape) for slot in slots}
    state_dict = OrderedDict((parameter.name, views[parameter.name]) for parameter in stage(model, pp))
    return {"args": _args(model, tp, pp), "checkpoint_version": 3.0, "iteration": ITERATION, "model": state_dict,
            "optimizer": {"optimizer": {"param_groups": [_param_group(0.01), _param_group(0.0)]}},
            "opt_param_scheduler": _scheduler(), "rng_state": [_rng_state()],
            "num_floating_point_operations_so_far": 1.0e18}


def _param_group(weight_decay: float) -> dict:
    return {"wd_mult": 1.0 if weight_decay else 0.0, "lr_mult": 1.0, "is_expert_parallel": False,
            "is_decoupled_lr": False, "max_lr": 3e-4, "min_lr": 3e-5, "lr": 2.5e-4, "bias_correction": True,
            "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay, "step": ITERATION}


def _scheduler() -> dict:
    return {"max_lr": 3e-4, "lr_warmup_steps": 1600.0, "num_steps": 8 * ITERATION, "lr_decay_style": "cosine",
            "lr_decay_steps": 800_000, "min_lr": 3e-5, "start_wd": 0.01, "end_wd": 0.01,
            "wd_incr_style": "constant", "wd_incr_steps": 800_000}


def _rng_state() -> dict:
    trackers = ("data-parallel-rng", "model-parallel-rng", "expert-parallel-rng")
    return {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(), "cuda_rng_state": torch.get_rng_state(),
            "rng_tracker_states": {name: torch.get_rng_state() for name in trackers}}


def _facts(model: Model) -> dict:
    return {"num_layers": model.layers, "hidden_size": model.hidden, "ffn_hidden_size": 4 * model.hidden,
            "num_attention_heads": model.heads, "num_query_groups": model.heads,
            "kv_channels": model.hidden // model.heads, "padded_vocab_size": model.vocab,
            "vocab_size": model.vocab, "make_vocab_size_divisible_by": 128, "swiglu": False,
            "max_position_embeddings": model.positions, "position_embedding_type": "learned_absolute",
            "normalization": "LayerNorm", "add_bias_linear": True, "num_experts": None,
            "untie_embeddings_and_output_weights": False}


def _args(model: Model, tp: int, pp: int) -> argparse.Namespace:
    return argparse.Namespace(
        **_facts(model), tensor_model_parallel_size=TP, pipeline_model_parallel_size=PP,
        virtual_pipeline_model_parallel_size=None, expert_model_parallel_size=1, context_parallel_size=1,
        data_parallel_size=1, group_query_attention=False, use_distributed_optimizer=True, ckpt_format="torch",
        bf16=True, params_dtype=torch.bfloat16, seq_length=model.positions, iteration=ITERATION,
        rank=pp * TP + tp, world_size=TP * PP)


def _layout(model: Model, tp: int, pp: int, slots: list[Slot], buckets: list[dict[str, int]]) -> dict:
    per_stage = model.layers // PP
    return {
        "schema": "parammap.layout", "version": 1,
        "framework": {"name": "megatron", "core_version": "0.12.0", "torch_version": str(torch.__version__)},
        "iteration": ITERATION, "checkpoint_format": "torch",
        "parallel": {"tp": TP, "pp": PP, "vpp": 1, "ep": 1, "etp": TP, "cp": 1, "dp": 1, "order": "tp-cp-ep-dp-pp",
                     "world_size": TP * PP},
        "rank": {"global": pp * TP + tp, "tp": tp, "pp": pp, "ep": 0, "etp": tp},
        "model": _facts(model),
        "chunks": [{"vpp": 0, "layers": {"decoder.layers": list(range(pp * per_stage, (pp + 1) * per_stage))},
                    "pre_process": pp == 0, "post_process": pp == PP - 1}],
        "optimizers": [{"class": "DistributedOptimizer", "kind": "dense", "data_parallel_size": 1, "buffers": [
            {"chunk": 0, "param_dtype": "bfloat16", "grad_dtype": "float32", "numel": buckets[-1]["end"],
             "buckets": buckets, "params": [_described(slot) for slot in slots]}]}]}


def _described(slot: Slot) -> dict:
    parameter = slot.parameter
    return {"name": parameter.name, "shape": list(parameter.shape), "dtype": "bfloat16", "start": slot.start,
            "end": slot.end, "bucket": slot.bucket, "partition_dim": parameter.partition_dim, "partition_stride": 1,
            "tensor_parallel": parameter.partition_dim != WHOLE, "tied": parameter.tied, "expert": False,
            "sequence_parallel": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the checkpoint's save folder goes")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the optimizer files (default: %(default)s)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print(make(int(args.gigabytes * 1e9), args.folder))


if __name__ == "__main__":
    main()
