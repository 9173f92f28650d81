"""Train tiny models with deepspeed's own engines on the CPU, save them its way, resume them from
universal checkpoints.

`python deepspeed_train.py JOBS.json`: a list of jobs, done one after the other in forked processes,
one per rank, over gloo. `rendezvous` is a file that is not there yet. A job's results go to
`truth`: the losses of its steps, and each parameter's fp32 weight and Adam moments by deepspeed's
own name, as deepspeed.utils gathers them, after loading and at the end. JOBS: see Job; a job with
`universal` runs deepspeed's own ds_to_universal."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing.connection
import os
import sys
from argparse import Namespace
from pathlib import Path

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
import deepspeed
import deepspeed.comm.torch
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
)
from torch import nn
from torch.nn import functional

#: gloo does as well, and needs no compiler; `deepspeed.comm.torch` is torch itself
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
VOCAB, POSITIONS, HIDDEN, HEADS, LAYERS, SAMPLES, LENGTH = 37, 11, 18, 3, 4, 12, 7


@dataclasses.dataclass
class Job:
    """stages > 0: a pipeline as Megatron-DeepSpeed's GPTModelPipe. zero: the stage; dtype: float32,
    bf16 or fp16. steps: those taken before saving, and `more` after it; skip: the batches that were
    seen before. load, save: roots; load_universal: which kind `load` holds. input, output: folders
    of ds_to_universal."""

    rendezvous: str
    truth: str = ""
    dp: int = 2
    stages: int = 0
    zero: int = 1
    dtype: str = "float32"
    steps: int = 3
    more: int = 0
    skip: int = 0
    frozen: bool = False
    load: str = ""
    load_universal: bool = False
    save: str = ""
    universal: bool = False
    input: str = ""
    output: str = ""

    def config(self) -> dict:
        return {
            "train_batch_size": SAMPLES,
            "train_micro_batch_size_per_gpu": SAMPLES // self.dp,
            "zero_optimization": {"stage": self.zero},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": self.dtype == "bf16"},
            "fp16": {"enabled": self.dtype == "fp16", "initial_scale_power": 4},
            "checkpoint": {"load_universal": self.load_universal},
        }


class Plain(nn.Module):
    """No known family: odd sizes, a tied head, a buffer, and, if asked for, layers that nobody
    trains."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, HIDDEN)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln": nn.LayerNorm(HIDDEN),
                    "fc": nn.Linear(HIDDEN, 23),
                    "proj": nn.Linear(23, HIDDEN, bias=False),
                }
            )
            for _ in range(2)
        )
        self.frozen = nn.Linear(HIDDEN, HIDDEN).requires_grad_(False) if frozen else nn.Identity()
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens[:, :-1])
        for layer in self.h:
            x = x + layer["proj"](functional.gelu(layer["fc"](layer["ln"](x)))) * self.scale.to(x)
        return loss(self.head(self.frozen(x)), tokens[:, 1:])


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB, HIDDEN)
        self.position_embeddings = nn.Embedding(POSITIONS, HIDDEN)

    @property
    def word_embeddings_weight(self) -> torch.Tensor:
        return self.word_embeddings.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.word_embeddings(tokens) + self.position_embeddings(
            torch.arange(tokens.shape[1])
        )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.query_key_value(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2).chunk(3, -1)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dense(out.transpose(1, 2).reshape(x.shape))


class Layer(nn.Module):
    """Under the names of Megatron's ParallelTransformerLayer."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            nn.LayerNorm(HIDDEN),
            nn.LayerNorm(HIDDEN),
        )
        self.self_attention = Attention()
        self.mlp = nn.ModuleDict(
            {
                "dense_h_to_4h": nn.Linear(HIDDEN, 4 * HIDDEN),
                "dense_4h_to_h": nn.Linear(4 * HIDDEN, HIDDEN),
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        hidden = functional.gelu(self.mlp["dense_h_to_4h"](self.post_attention_layernorm(x)))
        return x + self.mlp["dense_4h_to_h"](hidden)


def pipeline(stages: int) -> PipelineModule:
    """The functions of GPTModelPipe: embedding at 1, layers from 3 on, the final norm behind one
    that turns back."""

    def tied(**more: object) -> TiedLayerSpec:
        return TiedLayerSpec("embed", Embedding, tied_weight_attr="word_embeddings_weight", **more)

    functions = [
        lambda x: x,
        tied(),
        lambda x: x,
        *(LayerSpec(Layer) for _ in range(LAYERS)),
        lambda x: x,
        LayerSpec(nn.LayerNorm, HIDDEN),
        tied(
            forward_fn=lambda embedding, x: functional.linear(x, embedding.word_embeddings_weight)
        ),
    ]
    return PipelineModule(
        functions, num_stages=stages, loss_fn=loss, partition_method="type:Layer$"
    )


def engine_of(job: Job) -> deepspeed.DeepSpeedEngine:
    torch.manual_seed(11)
    model = pipeline(job.stages) if job.stages else Plain(job.frozen)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for _, p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=job.config()
    )
    return engine


def batch(number: int) -> torch.Tensor:
    """Tokens [SAMPLES, LENGTH + 1] of a step."""
    return torch.randint(
        VOCAB, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(1000 + number)
    )


def step(engine: deepspeed.DeepSpeedEngine, job: Job, number: int) -> float:
    rank = (
        torch.distributed.get_rank() % job.dp
        if not job.stages
        else engine.grid.get_data_parallel_rank()
    )
    own = batch(number).chunk(job.dp)[rank]
    if job.stages:
        return engine.train_batch(iter([(own[:, :-1], own[:, 1:])])).item()
    value = engine(own)
    engine.backward(value)
    engine.step()
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return (total / job.dp).item()


def states(engine: deepspeed.DeepSpeedEngine) -> dict:
    """By name, of the rank's own parameters: fp32, exp_avg, exp_avg_sq."""
    zero = engine.optimizer
    for own, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(own, flat, zero.optimizer.state)
    return {
        name: {
            "fp32": safe_get_full_fp32_param(p).clone(),
            **{
                key: safe_get_full_optimizer_state(p, key).clone()
                for key in ("exp_avg", "exp_avg_sq")
            },
        }
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }


def work(job: Job, rank: int, world: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
    )
    torch.set_num_threads(1)
    deepspeed.init_distributed(
        "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        init_method=f"file://{job.rendezvous}",
        rank=rank,
        world_size=world,
    )
    engine = engine_of(job)
    results: dict = {}
    if job.load:
        assert engine.load_checkpoint(job.load)[0]
        results["loaded"] = states(engine)
    results["losses"] = [step(engine, job, job.skip + number) for number in range(job.steps)]
    results["states"] = states(engine)
    if job.save:
        facts = {
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "bias_gelu_fusion": False,
            "layernorm_epsilon": 1e-5,
            "consumed_train_samples": 5,
        }
        client = (
            {"args": Namespace(**facts), "checkpoint_version": 3.0, "iteration": job.steps}
            if job.stages
            else {}
        )
        names = [
            r"tied_modules.embed.word_embeddings.weight",
            r"tied_modules.embed.position_embeddings.weight",
        ]
        engine.save_checkpoint(
            job.save,
            client_state={
                **client,
                "universal_checkpoint_info": {
                    "universal_checkpoint_version": 0.2,
                    "pipeline_replicated_parameter_patterns": names,
                },
            },
        )
    results["losses"] += [
        step(engine, job, job.skip + job.steps + number) for number in range(job.more)
    ]
    torch.save(results, f"{job.truth}.{rank}")
    torch.distributed.barrier()


def convert(job: Job) -> None:
    ds_to_universal.main(
        Namespace(
            input_folder=job.input,
            output_folder=job.output,
            num_extract_workers=1,
            strict=True,
            num_merge_workers=1,
            keep_temp_folder=False,
            inject_missing_state=False,
        )
    )


def run(job: Job) -> None:
    """All ranks of a job. Raises SystemExit if one fails; the others, which would wait for it, are
    killed."""
    world = max(job.stages, 1) * job.dp
    ranks = (
        [(convert, (job,))]
        if job.universal
        else [(work, (job, rank, world)) for rank in range(world)]
    )
    processes = [
        multiprocessing.get_context("fork").Process(target=target, args=args)
        for target, args in ranks
    ]
    for process in processes:
        process.start()
    while running := [process.sentinel for process in processes if process.exitcode is None]:
        multiprocessing.connection.wait(running)
        if any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
            raise SystemExit(f"{job}: a rank failed")


if __name__ == "__main__":
    for options in json.loads(Path(sys.argv[1]).read_text()):
        run(Job(**options))
