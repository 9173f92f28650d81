"""The flags that say which checkpoint is meant and how it is to be read, for every command that reads
one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.frameworks import registry
from parammap.frameworks.flags import positive


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The one checkpoint that a command is about."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="a save folder, or one of its iterations'"
    )


def add_arguments(parser: argparse.ArgumentParser, what: str = "", prefix: str = "") -> None:
    """`what` says whose flags these are, and `prefix` goes before those that name one checkpoint's
    own."""
    of = f" of {what}" if what else ""
    add, iteration = parser.add_argument, f"the iteration{of} to take (default: the latest)"
    sidecar = f"where param_map*.json or layout_*.json{of} are"
    add(f"--{prefix}iteration", type=int, metavar="N", help=iteration)
    add(f"--{prefix}sidecar", type=Path, metavar="DIR", help=sidecar)
    add_metadata(add, what, prefix)


def add_metadata(add: Callable[..., argparse.Action], what: str = "", prefix: str = "") -> None:
    """The flag for flat files of metaseq's that lost their metadata."""
    help = f"shards that describe flat metaseq files{f' of {what}' if what else ''}"
    add(f"--{prefix}metadata-from", type=Path, metavar="DIR", help=help)


def add_selection(add: Callable[..., argparse.Action]) -> None:
    """What of a checkpoint to read."""
    weights = "take the weights of model_optim_rng.pt, no optimizer state"
    add("--weights-only", action="store_true", help=weights)
    add("--drop", action="append", choices=["experts"], default=[], help="leave these tensors out")


def add_common(parser: argparse.ArgumentParser) -> None:
    add, workers = parser.add_argument, min(2, os.cpu_count() or 1)
    add_selection(add)
    help = "processes (default: %(default)s)"
    add("--workers", type=positive, default=workers, metavar="N", help=help)
    add("--json", action="store_true", help="the result as JSON")


def how(args: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """What these flags say, by the names of `registry.read`."""
    flags = vars(args)
    return {
        **{name: flags[prefix + name] for name in ("iteration", "sidecar", "metadata_from")},
        "weights_only": args.weights_only,
        "drop": frozenset(args.drop),
    }


def read(source: Path, args: argparse.Namespace, prefix: str = "") -> Checkpoint:
    return registry.read(source, **how(args, prefix))
