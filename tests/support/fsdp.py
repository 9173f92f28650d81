"""Writes checkpoints as metaseq does, with fairscale's own FSDP on a CPU, and what FSDP itself says
is in them.

`python -m tests.support.fsdp OPTIONS.json`: a list of Options. Each part is a model of its own that
fairscale shards over processes and trains; `<name>-model_part-P-shardR.pt` are its
`local_state_dict()` and `local_metadata_dict()` with the optimizer's state dict, `truth/part{P}.pt`
is {role: {name: tensor}} by FSDP's `state_dict()` of the gathered model. The model has metaseq's
names and shapes and no computation worth the name: its loss is a polynomial of each parameter."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

UPDATES = 3
BUFFERS = ("version", "_float_tensor")


@dataclasses.dataclass
class Options:
    """folder, name: where to, and what the files are called. parts × shards: their number. nested:
    each layer is an FSDP module of its own; empty_root: so is everything else. flatten: one flat
    parameter per module. The rest is the model's."""

    folder: str
    name: str = "checkpoint_3"
    parts: int = 1
    shards: int = 2
    dtype: str = "float32"
    nested: bool = True
    empty_root: bool = False
    flatten: bool = True
    tied: bool = True
    sinusoidal: bool = False
    legacy_norm: bool = False
    optimizer: bool = True
    layers: int = 2
    hidden: int = 12
    ffn: int = 28
    heads: int = 4
    vocab: int = 24
    positions: int = 6


class Holder(nn.Module):
    """Holds parameters by dotted names; applied to a number it adds a polynomial of them all, if
    they are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.own: list[str] = []
        self.trained = True

    def add(self, name: str, *shape: int) -> None:
        head, _, rest = name.partition(".")
        if rest:
            if head not in self._modules:
                self.add_module(head, Holder())
            self._modules[head].add(rest, *shape)
        else:
            self.register_parameter(head, nn.Parameter(torch.empty(shape)))
            self.own.append(head)

    def forward(self, total: torch.Tensor) -> torch.Tensor:
        for name in self.own if self.trained else ():
            parameter = getattr(self, name)
            slope = (
                torch.linspace(-1, 1, parameter.numel()).view(parameter.shape).to(parameter.dtype)
            )
            total = total + (parameter * slope + parameter * parameter).float().sum()
        for module in self._modules.values():
            total = module(total)
        return total


def layer(options: Options) -> Holder:
    """A decoder layer with the names and order that metaseq's has
    (modules/transformer_layer.py)."""
    made, hidden, parts = Holder(), options.hidden, options.parts
    ffn = options.ffn // parts
    made.add("self_attn.qkv_proj.weight", 3 * hidden // parts, hidden)
    made.add("self_attn.qkv_proj.bias", 3 * hidden // parts)
    made.add("self_attn.out_proj.weight", hidden, hidden // parts)
    made.add("self_attn.out_proj.bias", hidden)
    for which in ("weight", "bias"):
        made.add(f"self_attn_layer_norm.{which}", hidden)
    for number in range(parts if options.legacy_norm else 0):
        for which in ("weight", "bias"):
            made.add(f"ffn_layernorm.lns.{number}.{which}", ffn)
    for name, *shape in (
        ("fc1.weight", ffn, hidden),
        ("fc1.bias", ffn),
        ("fc2.weight", hidden, ffn),
        ("fc2.bias", hidden),
        ("final_layer_norm.weight", hidden),
        ("final_layer_norm.bias", hidden),
    ):
        made.add(name, *shape)
    return made


def decoder(options: Options, part: int, wrap: Callable[[nn.Module], nn.Module]) -> Holder:
    """The decoder of one part (models/transformer_decoder.py); `wrap` makes an FSDP module of a
    module."""
    made = Holder()
    rest = wrap if options.empty_root else lambda module: module
    embed_tokens, embed_positions, layer_norm = Holder(), Holder(), Holder()
    embed_tokens.add("weight", options.vocab // options.parts, options.hidden)
    if options.sinusoidal:
        embed_positions.register_buffer("_float_tensor", torch.zeros(1))
    else:
        embed_positions.add("weight", options.positions, options.hidden)
    for which in ("weight", "bias"):
        layer_norm.add(which, options.hidden)
    for module, name in (
        (embed_tokens, "embed_tokens"),
        (embed_positions, "embed_positions"),
        (layer_norm, "layer_norm"),
    ):
        initialized(module, name, part)
    made.register_buffer("version", torch.tensor([3.0]))
    made.add_module("embed_tokens", rest(embed_tokens))
    made.add_module(
        "embed_positions", embed_positions if options.sinusoidal else rest(embed_positions)
    )
    layers = [
        initialized(layer(options), f"layers.{number}", part) for number in range(options.layers)
    ]
    made.add_module("layers", Layers(wrap(one) if options.nested else one for one in layers))
    made.add_module("layer_norm", rest(layer_norm))
    if not options.empty_root:
        head = Holder()
        head.add("weight", options.vocab // options.parts, options.hidden)
        initialized(head, "output_projection", part)
        if options.tied:
            head.weight = embed_tokens.weight
        made.add_module("output_projection", head)
    return made


class Layers(nn.ModuleList):
    def forward(self, total: torch.Tensor) -> torch.Tensor:
        for module in self:
            total = module(total)
        return total


class Adam(torch.optim.Optimizer):
    """Adam with states of float32, as metaseq's for parameters of any dtype (optim/adam.py)."""

    def __init__(self, parameters) -> None:
        super().__init__(
            parameters, {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        )

    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            grad = parameter.grad.float()
            state = self.state[parameter]
            if not state:
                state.update(
                    step=0, exp_avg=torch.zeros_like(grad), exp_avg_sq=torch.zeros_like(grad)
                )
            state["step"] += 1
            state["exp_avg"].mul_(0.9).add_(grad, alpha=0.1)
            state["exp_avg_sq"].mul_(0.95).addcmul_(grad, grad, value=0.05)
            parameter.data.sub_(
                (0.01 * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)).to(parameter.dtype)
            )


def without_cuda() -> type[nn.Module]:
    """fairscale's FSDP, with nothing of torch or fairscale replaced but what asks for a GPU, or for
    more than gloo can."""
    from fairscale.nn.data_parallel import FullyShardedDataParallel as Fsdp

    class Stream:
        def wait_stream(self, *args: object) -> None:
            """Work on the CPU is done when its call returns."""

        synchronize = wait_stream

    stream, setup = Stream(), Fsdp._setup_streams

    def with_streams(self: nn.Module) -> None:
        setup(self)
        for name in ("fp32_to_fp16", "all_gather", "post_backward"):
            self._streams.setdefault(name, stream)

    Fsdp._setup_streams = with_streams
    torch.cuda.current_stream = lambda *args: stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.synchronize = lambda *args: None
    torch.Tensor.record_stream = lambda self, stream: None
    scatter = dist._reduce_scatter_base
    dist._reduce_scatter_base = lambda output, input, **kwargs: scatter(
        output, input.flatten(), **kwargs
    )
    return Fsdp


def initialized(model: Holder, prefix: str, part: int) -> Holder:
    """The module with random values: those that all parts keep are the same on each; norms of other
    parts are as they are made, and stay so."""
    for name, parameter in model.named_parameters(prefix):
        cut = not any(
            one in name for one in ("layer_norm", "embed_positions", "out_proj.bias", "fc2.bias")
        )
        generator = torch.Generator().manual_seed(sum(map(ord, name)) * 100 + part * cut)
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
            if ".lns." in name:
                parameter.fill_(name.endswith("weight"))
    for name, module in model.named_modules():
        if ".lns." in name:
            module.trained = name.endswith(f".lns.{part}")
    return model


def sharded(fsdp: type[nn.Module], options: Options, part: int, dtype: torch.dtype) -> nn.Module:
    def wrap(module: nn.Module) -> nn.Module:
        return fsdp(
            module.to(dtype),
            compute_device=torch.device("cpu"),
            flatten_parameters=options.flatten,
            compute_dtype=dtype,
            state_dict_device=torch.device("cpu"),
        )

    made = Holder()
    made.add_module("decoder", decoder(options, part, wrap))
    return wrap(made)


def run(fsdp: type[nn.Module], options: Options, part: int, shard: int, store: str) -> None:
    """One process: train, save its shard, and take part in saying what the truth is."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=shard, world_size=options.shards
    )
    model = sharded(
        fsdp, options, part, torch.float16 if options.dtype == "float16" else torch.float32
    )
    save_as = getattr(torch, options.dtype)
    optimizer = Adam(model.parameters())
    for _ in range(UPDATES):
        model.zero_grad()
        model(torch.zeros(1)).sum().backward()
        optimizer.step()
    folder = Path(options.folder)
    content = {
        "cfg": {
            "common": {"model_parallel_size": options.parts},
            "model": argparse.Namespace(
                decoder_attention_heads=options.heads, share_decoder_input_output_embed=options.tied
            ),
        },
        "model": {name: tensor.to(save_as) for name, tensor in model.local_state_dict().items()},
        "criterion": None,
        "optimizer_history": [{"num_updates": UPDATES}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1}},
        "shard_metadata": model.local_metadata_dict(),
    }
    if options.optimizer:
        content["last_optimizer_state"] = {**optimizer.state_dict(), "loss_scale": 4.0}
    torch.save(content, folder / f"{options.name}-model_part-{part}-shard{shard}.pt")
    truth = {"weight": {name: tensor.to(save_as) for name, tensor in model.state_dict().items()}}
    for role in ("exp_avg", "exp_avg_sq"):
        model_copy = sharded(fsdp, options, part, torch.float32)
        for own, there in zip(model_copy.parameters(), model.parameters(), strict=True):
            own.data.copy_(optimizer.state[there][role])
        truth[role] = {
            name: tensor
            for name, tensor in model_copy.state_dict().items()
            if not name.endswith(BUFFERS)
        }
    if shard == 0:
        (folder / "truth").mkdir(exist_ok=True)
        torch.save(truth, folder / "truth" / f"part{part}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(path: str) -> None:
    import torch._dynamo  # once, and not in each process

    fsdp = without_cuda()
    context = torch.multiprocessing.get_context("fork")
    for number, given in enumerate(json.loads(Path(path).read_text())):
        options = Options(**given)
        Path(options.folder).mkdir(parents=True, exist_ok=True)
        for part in range(options.parts):
            store = f"{path}.{number}.{part}"
            processes = [
                context.Process(target=run, args=(fsdp, options, part, shard, store))
                for shard in range(options.shards)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            if any(process.exitcode for process in processes):
                sys.exit(f"{options}: part {part} failed")


if __name__ == "__main__":
    main(sys.argv[1])
