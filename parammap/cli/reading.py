"""The flags that say how a checkpoint is to be read, for every command that reads one without
converting it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.frameworks import registry
from parammap.frameworks.flags import positive


def add_arguments(parser: argparse.ArgumentParser, what: str = "", prefix: str = "") -> None:
    """`what` says whose flags these are, and `prefix` goes before those that name one checkpoint's
    own."""
    of = f" of {what}" if what else ""
    add = parser.add_argument
    add(
        f"--{prefix}iteration",
        type=int,
        metavar="N",
        help=f"the iteration{of} to take (default: the latest)",
    )
    add(
        f"--{prefix}sidecar",
        type=Path,
        metavar="DIR",
        help=f"where param_map*.json or layout_*.json{of} are",
    )
    add_metadata(add, what, prefix)


def add_metadata(add: Callable[..., argparse.Action], what: str = "", prefix: str = "") -> None:
    """The flag for flat files of metaseq's that lost their metadata."""
    of = f" of {what}" if what else ""
    add(
        f"--{prefix}metadata-from",
        type=Path,
        metavar="DIR",
        help=f"shards that describe flat metaseq files{of}",
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--weights-only",
        action="store_true",
        help="take the weights of model_optim_rng.pt, no optimizer state",
    )
    add("--drop", action="append", choices=["experts"], default=[], help="leave these tensors out")
    add(
        "--workers",
        type=positive,
        default=min(2, os.cpu_count() or 1),
        metavar="N",
        help="processes (default: %(default)s)",
    )
    add("--json", action="store_true", help="the result as JSON")


def read(source: Path, args: argparse.Namespace, prefix: str = "") -> Checkpoint:
    flags = vars(args)
    return registry.read(
        source,
        iteration=flags[f"{prefix}iteration"],
        sidecar=flags[f"{prefix}sidecar"],
        metadata_from=flags[f"{prefix}metadata_from".replace("-", "_")],
        weights_only=args.weights_only,
        drop=frozenset(args.drop),
    )
