"""`parammap convert SRC DST --to FRAMEWORK`: write a checkpoint for another framework."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from parammap.cli import reading, running
from parammap.frameworks import options, registry
from parammap.frameworks.flags import numbers, positive
from parammap.job.request import Request

SIZES = {
    "tp": "tensor",
    "pp": "pipeline",
    "vpp": "virtual pipeline",
    "ep": "expert",
    "etp": "expert tensor",
    "cp": "context",
    "dp": "data",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="a save folder, or one of its iteration folders")
    add("target", type=Path, metavar="DST", help="the folder to make")
    add("--to", required=True, choices=list(registry.targets()), help="the framework to write for")
    reading.add_arguments(parser)
    reading.add_selection(add)
    add(
        "--keep-foreign-objects",
        type=lambda text: frozenset(text.split(",")),
        default=frozenset(),
        metavar="MODULE,MODULE,…",
        help="pass on objects of classes in these modules, which whoever loads the output calls; "
        "without it, they are refused",
    )
    add(
        "--accept-stale",
        action="store_true",
        help="status 0 although the model's own copy is older than the optimizer's",
    )
    add(
        "--accept-permuted",
        action="store_true",
        help="convert although optimizer slices are permuted",
    )
    running.add_arguments(parser, workers=min(2, os.cpu_count() or 1))
    add(
        "--ray",
        metavar="ADDRESS",
        help="run on this Ray cluster instead: auto, HOST:PORT or ray://HOST:PORT",
    )
    options.add_arguments(parser.add_argument_group("what to write"))
    sizes = parser.add_argument_group("layout of the output (default: the source's)")
    for name, what in SIZES.items():
        sizes.add_argument(f"--{name}", type=positive, metavar="N", help=f"{what} parallel size")
    sizes.add_argument(
        "--stage-layers",
        type=numbers,
        default=(),
        metavar="N,N,…",
        help="layers of each pipeline stage, or of each chunk in the order in which data passes "
        "them",
    )
    sizes.add_argument(
        "--make-vocab-size-divisible-by",
        type=positive,
        metavar="N",
        help="pad the vocabulary's rows to a multiple of this times tp",
    )


def run(args: argparse.Namespace) -> int:
    sizes = {name: value for name in SIZES if (value := getattr(args, name)) is not None}
    return running.convert(
        Request(
            source=args.source,
            target=args.target,
            to=args.to,
            sizes=sizes,
            stage_layers=args.stage_layers,
            vocab_divisible_by=args.make_vocab_size_divisible_by,
            options=options.of(args),
            **reading.how(args),
            keep_foreign_objects=args.keep_foreign_objects,
            accept_stale=args.accept_stale,
            accept_permuted=args.accept_permuted,
            **running.how(args),
            ray=args.ray,
        )
    )
