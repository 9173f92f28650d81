"""Train metaseq's own OPT model with metaseq's own Trainer under fairscale FSDP, on the CPU, and
save it metaseq's way.

`python metaseq_train.py OPTIONS.json RANK`: one process per rank. Nothing of metaseq, fairscale or
torch is replaced but what asks for a GPU: CUDA streams, fused kernels, NCCL's flat reduce-scatter.
The task has no data pipeline; its batches are random tokens. OPTIONS: see Options."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist


@dataclasses.dataclass
class Options:
    """metaseq: folder that holds the (patched) package. save: save_dir. port: a free TCP port.

    parts, shards: sizes of model parallelism and FSDP. dtype: float32, or float16 (--fp16
    --memory-efficient-fp16). arguments: further arguments of metaseq's own command line. mark: make
    each exp_avg a copy of its parameter before saving, so that the file itself tells whose state it
    is."""

    metaseq: str
    save: str
    port: int
    parts: int = 1
    shards: int = 2
    dtype: str = "float32"
    updates: int = 3
    arguments: list = dataclasses.field(default_factory=list)
    mark: bool = False


def pretend_to_have_cuda_streams() -> None:
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    class Stream:
        def wait_stream(self, *args: object) -> None:
            """Work on the CPU is done when its call returns."""

        synchronize = wait_stream

    the_one = Stream()
    torch.cuda.current_stream = torch.cuda.Stream = lambda *args, **kwargs: the_one
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.synchronize = lambda *args: None
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.get_rng_state, torch.cuda.set_rng_state = torch.get_rng_state, torch.set_rng_state
    torch.Tensor.record_stream = lambda self, stream: None
    reduce_scatter = dist._reduce_scatter_base
    setup_streams = FullyShardedDataParallel._setup_streams

    def with_streams(self: FullyShardedDataParallel) -> None:
        setup_streams(self)
        for name in ("fp32_to_fp16", "all_gather", "post_backward"):
            self._streams.setdefault(name, torch.cuda.Stream())

    FullyShardedDataParallel._setup_streams = with_streams
    dist._reduce_scatter_base = lambda output, input, **kwargs: reduce_scatter(
        output, input.flatten(), **kwargs
    )


class CausalSoftmax:
    """What the fused kernel computes: softmax(scale * scores) over the keys that a query may
    see."""

    @staticmethod
    def forward(scores: torch.Tensor, scale: float) -> torch.Tensor:
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return (scores * scale).masked_fill(unseen, float("-inf")).softmax(-1)

    @staticmethod
    def backward(grads: torch.Tensor, probabilities: torch.Tensor, scale: float) -> torch.Tensor:
        products = grads * probabilities
        return scale * (products - probabilities * products.sum(-1, keepdim=True))


def make_metaseq_importable() -> None:
    """What it lacks without CUDA, in fairscale 0.4.13, and in Python 3.11, whose dataclasses refuse
    unhashable defaults."""
    kernels = types.ModuleType("metaseq.modules.megatron.fused_kernels")
    kernels.scaled_upper_triang_masked_softmax_cuda = CausalSoftmax
    kernels.scaled_masked_softmax_cuda = None
    sys.modules[kernels.__name__] = kernels
    for name in (
        "fairscale.utils",
        "fairscale.utils.testing",
    ):  # the fork that metaseq pins has it here
        sys.modules[name] = types.ModuleType(name)
    sys.modules["fairscale.utils.testing"].DummyProcessGroup = type("DummyProcessGroup", (), {})
    original = dataclasses.dataclass

    def dataclass(cls: type | None = None, /, **options: object) -> object:
        def decorate(cls: type) -> type:
            cls = original(cls, **options)
            if cls.__hash__ is None:
                cls.__hash__ = object.__hash__
            return cls

        return decorate if cls is None else decorate(cls)

    dataclasses.dataclass = dataclass


def command_line(options: Options) -> list[str]:
    precision = (
        ["--fp16", "--memory-efficient-fp16", "--fp16-init-scale", "4"]
        if options.dtype == "float16"
        else []
    )
    return [
        "none",
        "--task",
        "streaming_language_modeling",
        "--vocab-filename",
        "x",
        "--merges-filename",
        "y",
        "--criterion",
        "vocab_parallel_cross_entropy",
        "--arch",
        "transformer_lm_megatron",
        "--optimizer",
        "adam",
        "--lr",
        "0.01",
        "--lr-scheduler",
        "polynomial_decay",
        "--total-num-update",
        "10",
        "--batch-size",
        "2",
        "--ddp-backend",
        "fully_sharded",
        "--use-sharded-state",
        "--model-parallel-size",
        str(options.parts),
        "--distributed-world-size",
        str(options.parts * options.shards),
        "--save-dir",
        options.save,
        "--save-interval-updates",
        "1",
        "--decoder-layers",
        "3",
        "--decoder-embed-dim",
        "20",
        "--decoder-ffn-embed-dim",
        "44",
        "--decoder-attention-heads",
        "4",
        "--share-decoder-input-output-embed",
        "--decoder-learned-pos",
        "--no-scale-embedding",
        "--dropout",
        "0",
        "--tokens-per-sample",
        "18",
        "--min-params-to-wrap",
        "0",
        *precision,
        *options.arguments,
    ]


class Epoch:
    """What save_checkpoint() asks of metaseq's batch iterator."""

    epoch = 1

    def end_of_epoch(self) -> bool:
        return False

    def state_dict(self) -> dict:
        return {"epoch": 1}


def train(options: Options, rank: int) -> None:
    torch.set_num_threads(1)
    pretend_to_have_cuda_streams()
    make_metaseq_importable()
    from metaseq import checkpoint_utils, criterions
    from metaseq import options as metaseq_options
    from metaseq.data import Dictionary
    from metaseq.dataclass.utils import convert_namespace_to_omegaconf
    from metaseq.distributed import fsdp_enable_wrap, fsdp_wrap
    from metaseq.distributed import utils as distributed_utils
    from metaseq.tasks.base_task import LegacyTask
    from metaseq.trainer import Trainer

    class RandomTokens(LegacyTask):
        dictionary = Dictionary()
        source_dictionary = target_dictionary = dictionary

    for word in range(48):
        RandomTokens.dictionary.add_symbol(f"w{word}")
    args = metaseq_options.parse_args_and_arch(
        metaseq_options.get_training_parser(), command_line(options)
    )
    cfg = convert_namespace_to_omegaconf(args)
    distributed = cfg.distributed_training
    distributed.distributed_backend, distributed.distributed_rank = "gloo", rank
    distributed.distributed_init_method = f"tcp://127.0.0.1:{options.port}"
    distributed_utils.distributed_init(cfg)
    torch.manual_seed(1)
    task = RandomTokens(args)
    criterion = criterions.build_criterion(cfg.criterion, task)
    with fsdp_enable_wrap(
        distributed,
        use_sharded_state=distributed.use_sharded_state,
        compute_device=torch.device("cpu"),
    ):
        model = fsdp_wrap(
            task.build_model(cfg.model), process_group=distributed_utils.get_data_parallel_group()
        )
    trainer = Trainer(cfg, task, model, criterion)
    for _ in range(options.updates):
        tokens = torch.randint(4, 52, (2, 18))
        trainer.train_step(
            [
                {
                    "id": torch.arange(2),
                    "nsentences": 2,
                    "ntokens": 36,
                    "target": tokens,
                    "net_input": {"src_tokens": tokens},
                }
            ]
        )
    if options.mark:
        for param in trainer.optimizer.params:
            trainer.optimizer.optimizer.state[param]["exp_avg"].copy_(param.data)
    checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, Epoch())


if __name__ == "__main__":
    given = Options(**json.loads(Path(sys.argv[1]).read_text()))
    sys.path.insert(0, given.metaseq)
    train(given, int(sys.argv[2]))
