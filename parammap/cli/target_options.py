"""The flags of `parammap convert` that only some target frameworks have, and the options that they
make."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parammap.cli.arguments import positive
from parammap.errors import RefusedError
from parammap.frameworks.alpa import serving as alpa
from parammap.frameworks.alpa import training as alpa_training
from parammap.frameworks.megatron import specification
from parammap.frameworks.megatron_dist import target as megatron_dist
from parammap.frameworks.merak import partition as merak_partition
from parammap.frameworks.merak import target as merak
from parammap.frameworks.metaseq import target as metaseq
from parammap.frameworks.mindspore import target as mindspore
from parammap.frameworks.transformers import target as transformers

#: flag: (its targets, what argparse is told)
FLAGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "--dtype": (
        ("mindspore", "metaseq", "alpa", "alpa-training", "merak", "transformers"),
        {
            "choices": ["float32", "float16", "bfloat16"],
            "help": "cast the weights (default: as on disk; float16 for alpa; MindSpore: float32, "
            "with --weights-only)",
        },
    ),
    "--format": (
        ("mindspore", "transformers"),
        {
            "choices": [*sorted(mindspore.FRAMES), transformers.BIN],
            "help": "file format (default: ckpt; safetensors)",
        },
    ),
    "--names": (
        ("mindspore",),
        {"choices": mindspore.NAMES, "help": "whose tensor names (default: mindspore)"},
    ),
    "--file-prefix": (
        ("mindspore",),
        {"metavar": "NAME", "help": "file name without ending (default: network)"},
    ),
    "--generate-all-dp-cp": (
        ("mindspore",),
        {
            "action": "store_true",
            "default": None,
            "help": "a file for every rank, as hard links where possible",
        },
    ),
    "--form": (
        ("metaseq",),
        {
            "choices": sorted(metaseq.NAMES),
            "help": "flat parameters, whole tensors, or one file for all (default: flat)",
        },
    ),
    "--transformer-impl": (
        ("megatron", "megatron-dist", "mindspore"),
        {
            "choices": specification.CHOICES,
            "help": "whose layers a model of another framework gets, as Megatron-LM's flag of "
            "that name (default: transformer_engine)",
        },
    ),
    "--vocab-size": (
        ("alpa", "alpa-training"),
        {
            "type": positive,
            "metavar": "N",
            "help": "rows of the word embedding (default: the source's)",
        },
    ),
    "--activation": (
        ("alpa", "alpa-training", "merak", "transformers"),
        {
            "choices": ["relu", "gelu", "gelu_new", "silu"],
            "help": "of a source that does not record it",
        },
    ),
    "--config": (
        ("merak", "transformers"),
        {
            "type": Path,
            "metavar": "FILE",
            "help": "a config.json that says what the source does not record",
        },
    ),
    "--max-shard-size": (
        ("transformers",),
        {
            "type": transformers.shard_size,
            "metavar": "SIZE",
            "help": "of a file of weights, as 5GB or 200MB (default: 5GB)",
        },
    ),
    "--model": (
        ("alpa-training",),
        {
            "choices": sorted(alpa_training.MODELS),
            "help": "whose tree (default: opt for OPT, else gpt2)",
        },
    ),
    "--optimizer": (
        ("alpa-training",),
        {
            "choices": sorted(alpa_training.OPTIMIZERS),
            "help": "whose state (default: examples, that of Alpa's own)",
        },
    ),
    "--partition-method": (
        ("merak",),
        {
            "choices": merak_partition.METHODS,
            "help": "how modules are cut over stages (default: uniform)",
        },
    ),
    "--custom-partition": (
        ("merak",),
        {
            "type": merak_partition.cut_list,
            "metavar": "0,N,…",
            "help": "the first module of each stage, and their number",
        },
    ),
    "--folder": (
        ("merak",),
        {"choices": merak.FOLDERS, "help": "name of the folder (default: release)"},
    ),
    "--scheme": (
        ("merak",),
        {
            "choices": merak.SCHEMES,
            "help": "where the one file of tp 1, pp 1 goes (default: all_dp, as up to v2.2.1)",
        },
    ),
    "--serialization": (
        ("merak",),
        {"choices": sorted(merak.FRAMES), "help": "torch's file format (default: zip)"},
    ),
    "--no-parallel-vocab": (
        ("merak",),
        {"action": "store_true", "default": None, "help": "the whole vocabulary on each rank"},
    ),
    "--for-release": (
        ("merak",),
        {"action": "store_true", "default": None, "help": "zero the counters of consumed samples"},
    ),
}
#: the file formats of each target that has several
FORMATS = {"mindspore": mindspore.FRAMES, "transformers": transformers.FRAMES}
#: target: how its options are made of the flags that were given, by their names
_MAKE: dict[str, Callable[..., Any]] = {
    "mindspore": lambda dtype=None, generate_all_dp_cp=False, **flags: mindspore.Options(
        cast=dtype, all_dp_cp=generate_all_dp_cp, **flags
    ),
    "megatron": specification.Options,
    "megatron-dist": megatron_dist.Options,
    "transformers": lambda dtype=None, **flags: transformers.Options(cast=dtype, **flags),
    "metaseq": lambda dtype=None, **flags: metaseq.Options(cast=dtype, **flags),
    "merak": lambda dtype=None, no_parallel_vocab=False, **flags: merak.Options(
        cast=dtype, parallel_vocab=not no_parallel_vocab, **flags
    ),
    "alpa": lambda dtype="float16", **flags: alpa.Options(dtype, **flags),
    "alpa-training": lambda dtype="float32", **flags: alpa_training.Options(dtype, **flags),
}


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    for flag, (targets, told) in FLAGS.items():
        parser.add_argument(flag, **{**told, "help": f"{', '.join(targets)}: {told['help']}"})


def of(args: argparse.Namespace) -> Any:
    """The options of the target that `args.to` names. Raises RefusedError for a flag that is not
    one of its own."""
    given = {flag: value for flag in FLAGS if (value := getattr(args, _name(flag))) is not None}
    for flag in given:
        if args.to not in FLAGS[flag][0]:
            raise RefusedError(
                f"{flag}: means nothing with --to {args.to}, only with "
                f"{', '.join(FLAGS[flag][0])}; leave "
                "it out"
            )
    if args.format and args.format not in FORMATS[args.to]:
        raise RefusedError(
            f"--format {args.format}: is no format of --to {args.to}, only "
            f"{', '.join(FORMATS[args.to])} are"
        )
    if (
        args.to == "mindspore"
        and args.dtype
        and not (args.weights_only and args.dtype == "float32")
    ):
        raise RefusedError(
            f"--dtype {args.dtype}: an optimizer's states keep their dtype; float32 goes with --to "
            f"mindspore "
            "--weights-only"
        )
    make = _MAKE.get(args.to)
    return make and make(**{_name(flag): value for flag, value in given.items()})


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
