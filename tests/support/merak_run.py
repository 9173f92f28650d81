"""Checkpoints of a run, by Merak's own code (a checkout of d72efe5, as MERAK), on a CPU: python -m
tests.support.merak_run OUT.

Merak's are the ties (PipelineModule.tie_modules), the parameter groups, ZeRO-1 with its partitions
and state dicts, and the names of files. Its pipeline cannot be built without its tracer and CUDA,
so that modules of transformers' GPT-2 stand here under the names that the tracer gives them, and
the fused kernels' modules are plain Linears. Each folder comes with truth.pt: weights, their copies
and moments by transformers' names, of an AdamW over whole float32 tensors."""

from __future__ import annotations

import copy
import os
import sys
import types
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

CONFIG = {
    "vocab_size": 20,
    "n_positions": 6,
    "n_embd": 8,
    "n_layer": 3,
    "n_head": 2,
    "attn_pdrop": 0.0,
}
RATES = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS, ITERATION = 3, 5
WORDS, HEAD = "transformer.wte.weight", "lm_head.weight"


@dataclass(frozen=True)
class Run:
    """A run's layout; `interval` is ZeRO's max_elements_per_comm, 0 for a run without ZeRO, whose
    weights are float32."""

    tp: int = 1
    cuts: tuple[int, ...] = (0, CONFIG["n_layer"] + 3)
    dp: int = 1
    interval: int = 0
    parallel_vocab: bool = False

    @property
    def pp(self) -> int:
        return len(self.cuts) - 1


RUNS = {
    "zero_tp1pp1dp3": Run(dp=3, interval=10**8),
    "zero_tp2pp2dp2": Run(2, (0, 3, 6), 2, 300, parallel_vocab=True),
    "adamw_tp2pp1": Run(2),
    "adamw_tp1pp3": Run(1, (0, 1, 4, 6)),
}


def merak(checkout: Path) -> types.SimpleNamespace:
    """Merak's modules, beside stand-ins for what needs CUDA, apex or the tracer."""

    def module(name: str, **content: object) -> types.ModuleType:
        made = types.ModuleType(name)
        vars(made).update(content)
        sys.modules[name] = made
        return made

    quiet = lambda *_, **__: None  # noqa: E731
    for name in ("Merak", "Merak.utils", "Merak.modules", "Merak.modules.lora", "Merak.runtime"):
        module(
            name,
            __path__=[str(checkout / name.replace(".", "/"))],
            print_rank_0=quiet,
            log_dist=quiet,
            get_args=quiet,
            logger=types.SimpleNamespace(info=quiet, warning=quiet),
        )
    mpu = sys.modules["Merak"].mpu = module("Merak.mpu", __path__=[])
    module("Merak.mpu.layers", VocabParallelEmbedding=torch.nn.Embedding)
    module("Merak.runtime.checkpointing", checkpoint=quiet, get_cuda_rng_tracker=quiet)
    module("Merak.runtime.utils", CheckOverflow=lambda *_, **__: None)
    module("Merak.autoshard", __path__=[])
    module("Merak.autoshard.convert", add_inputs_to_shards=quiet)
    module("Merak.modules.layer_proxy", EmbeddingProxy=(), LinearProxy=())
    arguments = module("Merak.utils.merak_args")
    arguments.MerakArguments = type("MerakArguments", (), {"__module__": arguments.__name__})
    from Merak.modules.module import PipelineModule
    from Merak.modules.utils import get_params_for_weight_decay_optimization
    from Merak.utils import checkpoint
    from Merak.utils.zero1_optimizer import FP16_DeepSpeedZeroOptimizer_Stage1

    return types.SimpleNamespace(
        mpu=mpu,
        groups=get_params_for_weight_decay_optimization,
        zero=FP16_DeepSpeedZeroOptimizer_Stage1,
        tie_modules=PipelineModule.tie_modules,
        name=checkpoint.get_checkpoint_name,
        shapes=checkpoint.get_zero_param_shapes,
        Arguments=arguments.MerakArguments,
    )


def share(name: str, whole: torch.Tensor, run: Run, tp: int) -> torch.Tensor:
    """What a tensor-parallel rank holds of transformers' tensor."""
    if run.tp == 1 or ".ln_" in name or "wpe" in name or name.endswith("c_proj.bias"):
        return whole.clone()
    if "wte" in name or "lm_head" in name:
        return (whole.chunk(run.tp)[tp] if run.parallel_vocab else whole).clone()
    turned = whole.T if whole.dim() == 2 else whole
    if "c_attn" in name:
        return torch.cat([part.chunk(run.tp)[tp] for part in turned.chunk(3)]).contiguous()
    return turned.chunk(run.tp, dim=int(name.endswith("c_proj.weight")))[tp].contiguous()


def place(root: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, torch.nn.Module())
        root = getattr(root, parent)
    root.add_module(last, module)


def linear(inner: str, old: Conv1D) -> torch.nn.Module:
    outer = torch.nn.Module()
    outer.add_module(inner, torch.nn.Linear(1, 1))
    return outer


def stage(
    made: types.SimpleNamespace, run: Run, pp: int, tp: int, tensors: dict[str, torch.Tensor]
) -> torch.nn.Module:
    """An engine around one rank's pipeline stage, its parameters those of the whole model's
    `tensors`."""
    hugging_face = GPT2LMHeadModel(GPT2Config(**CONFIG))
    layers = CONFIG["n_layer"]
    modules = [
        ["transformer.wte"],
        ["transformer.wpe"],
        *([f"transformer.h.{i}"] for i in range(layers)),
        ["transformer.ln_f", "lm_head"],
    ]
    pipe, engine = torch.nn.Module(), torch.nn.Module()
    pipe.tied_modules, pipe.tied_weight_attrs = torch.nn.ModuleDict(), {}
    for number in range(run.cuts[pp], run.cuts[pp + 1]):
        shard = torch.nn.Module()
        for path in modules[number]:
            part = copy.deepcopy(hugging_face.get_submodule(path))
            if run.tp > 1 and ".h." in path:
                part.attn.c_attn, part.attn.c_proj = (
                    linear("col_linear", part.attn.c_attn),
                    linear("row_linear", None),
                )
                part.mlp.c_fc, part.mlp.c_proj = (
                    linear("col_linear", None),
                    linear("row_linear", None),
                )
            place(shard, path, part)
        pipe.add_module(str(number), shard)
    for name, parameter in pipe.named_parameters():
        own = name.partition(".")[2].replace(".col_linear", "").replace(".row_linear", "")
        parameter.data = share(own, tensors[own], run, tp)
    words = (CONFIG["vocab_size"] // (run.tp if run.parallel_vocab else 1), CONFIG["n_embd"])
    pipe.tied_modules_keys = {str(torch.Size(words)).replace(".", "_")}
    pipe._topo = types.SimpleNamespace(
        get_dim=lambda _: 1
    )  # the ties themselves; their groups are of no interest
    made.tie_modules(pipe)
    engine.module = pipe
    return engine


def by_parameter(engine: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
    """transformers' name of each parameter."""
    names = {
        parameter: name
        for name, parameter in engine.named_parameters(remove_duplicate=False)
        if "tied_modules" not in name
    }
    return {
        parameter: name.split(".", 2)[2].replace(".col_linear", "").replace(".row_linear", "")
        for parameter, name in names.items()
    }


def train(
    weights: dict[str, torch.Tensor], dtype: torch.dtype, words: int
) -> tuple[dict, list[dict]]:
    """An AdamW's states of the whole model by role and name, and the gradients of each step. The
    words are stepped as often as they are among an optimizer's parameters: a head that is tied to
    them in the same stage is one of its own."""
    generator = torch.Generator().manual_seed(7)
    main = {
        name: torch.nn.Parameter(weight.to(dtype).float())
        for name, weight in weights.items()
        if name != HEAD
    }
    plain = [name for name in main if ".ln_" in name or name.endswith("bias")]
    decayed = [*(name for name in main if name not in plain), *[WORDS] * (words - 1)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [main[name] for name in decayed]},
            {"params": [main[name] for name in plain], "weight_decay": 0.0},
        ],
        **RATES,
        foreach=False,
    )
    history = [
        {name: torch.randn(weight.shape, generator=generator) for name, weight in main.items()}
        for _ in range(STEPS)
    ]
    for grads in history:
        for name, parameter in main.items():
            parameter.grad = grads[name].clone()
        optimizer.step()
    states = {"weight": {name: parameter.detach() for name, parameter in main.items()}}
    for role in ("exp_avg", "exp_avg_sq"):
        states[role] = {name: optimizer.state[parameter][role] for name, parameter in main.items()}
    return states, history


def save(made: types.SimpleNamespace, run: Run, root: Path) -> None:
    """The folder of one run, and its truth."""
    dtype = torch.float16 if run.interval else torch.float32
    torch.manual_seed(11)
    model = GPT2LMHeadModel(GPT2Config(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # fresh biases are 0 and norms are 1
    weights = {
        name: value for name, value in model.state_dict().items() if not name.endswith(".attn.bias")
    }
    states, history = train(weights, dtype, 2 if run.pp == 1 and not run.interval else 1)
    args = made.Arguments()
    vars(args).update(
        num_layers=CONFIG["n_layer"],
        parallel_vocab=run.parallel_vocab,
        zero_optimization=bool(run.interval),
    )
    made.mpu.get_model_parallel_world_size, made.mpu.get_pipe_parallel_world_size = (
        lambda: run.tp,
        lambda: run.pp,
    )
    for tp in range(run.tp):
        for pp, _ in enumerate(pairwise(run.cuts)):
            for dp in range(run.dp):
                ranks = {"model": tp, "pipe": pp, "data": dp}
                for what, rank in ranks.items():
                    setattr(made.mpu, f"get_{what}_parallel_rank", lambda rank=rank: rank)
                _save_rank(made, run, args, root, (tp, pp, dp), weights, states, history, dtype)
    (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    copies = {name: value.to(dtype) for name, value in states["weight"].items()}
    torch.save({**states, "model_weight": copies}, root / "truth.pt")


def _save_rank(made, run, args, root, rank, weights, states, history, dtype) -> None:
    tp, pp, dp = rank
    engine = stage(made, run, pp, tp, {name: weights[_untied(name)].to(dtype) for name in weights})
    names = by_parameter(engine)
    rates = {**RATES, "foreach": False}
    groups = [{**group} for group in made.groups(engine)]
    base = torch.optim.AdamW(groups, **rates)
    model_file, optimizer_file = made.name(str(root), ITERATION, args)
    if run.interval:
        with (
            mock.patch("torch.distributed.get_rank", lambda **_: dp),
            mock.patch("torch.distributed.get_world_size", lambda **_: run.dp),
            mock.patch("torch.cuda.current_device", lambda: "cpu"),
            mock.patch("torch.Tensor.cuda", lambda own, *_: own),
        ):
            zero = made.zero(base, dp_process_group=None, max_elements_per_comm=run.interval)
            for grads in history:
                own = {
                    parameter: share(name, grads[_untied(name)], run, tp)
                    for parameter, name in names.items()
                }
                _step(zero, run.dp, dp, own)
            state = {
                "optimizer_state_dict": zero.state_dict(),
                "param_shapes": made.shapes(zero, engine),
            }
        Path(optimizer_file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, optimizer_file)
    else:
        for grads in history:
            for parameter, name in names.items():
                parameter.grad = share(name, grads[_untied(name)], run, tp)
            base.step()
    if dp == 0:
        for parameter, name in names.items():
            parameter.data = share(name, states["weight"][_untied(name)], run, tp).to(dtype)
        Path(model_file).parent.mkdir(parents=True, exist_ok=True)
        content = {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": ITERATION,
            "model": engine.state_dict(),
        }
        if not run.interval:
            content["optimizer"] = base.state_dict()
        torch.save(content, model_file, _use_new_zipfile_serialization=False)


def _untied(name: str) -> str:
    return WORDS if name == HEAD else name


def _step(zero: object, world: int, dp: int, grads: dict) -> None:
    """One step of the rank's partitions, cut by ZeRO's own functions."""
    own = zip(zero.fp16_groups, zero.local_sub_partitions_of_fp32_groups, strict=True)
    for group, (parameters, partitions) in enumerate(own):
        flat = zero.flatten_dense_tensors_sub_partition_aligned(
            [grads[parameter] for parameter in parameters],
            world,
            zero.max_elems_per_comm[group],
            None,
        )
        _, cut, *_ = zero.get_data_parallel_sub_partitions(
            flat, zero.max_elems_per_comm[group], world
        )
        for partition, grad in zip(partitions, cut[dp], strict=True):
            partition.grad = grad.clone()
    zero.optimizer.step()


def main(out: Path, checkout: Path) -> None:
    made = merak(checkout)
    for name, run in RUNS.items():
        save(made, run, out / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(os.environ["MERAK"]))
