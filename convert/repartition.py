"""Yuan-2.0's split_tp, merge_tp and merge_pp, in one step, with the flags that their users know.

A size that is left out is the source's; a number that contradicts the checkpoint is an error. As
Yuan-2.0 documents them, flags may have dashes at their end."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parammap.cli import running
from parammap.cli.main import run
from parammap.errors import RefusedError
from parammap.frameworks.flags import numbers, positive
from parammap.job.repartition import NUMBERS, Repartition, repartition
from parammap.tensors.names import shorten_names

_SIZES = {"tensor_model_parallel_size": "tp", "pipeline_model_parallel_size": "pp"}
#: what is in the names of flags that say what to do, not what the model is like
_OURS = re.compile("target|generate|parallel-(size|blocks)")


def main(argv: Sequence[str] | None = None) -> int:
    parser = running.script_parser(__doc__)
    for names, kind, what in (
        (["load", "save"], Path, "the checkpoint to read, the folder to make"),
        ([*_SIZES, *NUMBERS, "target_num_layers"], positive, "checked where given"),
        ([f"target_{name}" for name in _SIZES], positive, "of the output (default: the source's)"),
        (["pipeline_model_parallel_blocks"], numbers, "of the source: checked where given"),
        (["target_pipeline_model_parallel_blocks"], numbers, "layers of each output stage"),
        (["pipeline_generate_layer", "tensor_generate_layer"], numbers, "the ranks to write"),
    ):
        for name in names:
            flag = f"--{name.replace('_', '-')}"
            parser.add_argument(flag, type=kind, required=kind is Path, help=what)
    running.add_arguments(parser)
    parser.add_argument("--no-load-optim", action="store_true", help="the weights alone")
    parser.add_argument("--process-checkpoint", action="store_true", help="does nothing here")
    given = sys.argv[1:] if argv is None else argv
    args, others = parser.parse_known_args([a.rstrip("-") if a[:2] == "--" else a for a in given])
    flags = [other.partition("=")[0] for other in others if other.startswith("--")]
    return run(lambda: _repartition(args, flags))


def _repartition(args: argparse.Namespace, others: list[str]) -> int:
    if unknown := shorten_names(flag for flag in others if _OURS.search(flag)):
        raise RefusedError(f"{unknown}: no such flag; --help lists those that there are")
    report = repartition(
        Repartition(
            source=args.load,
            target=args.save,
            sizes=_given(args, _SIZES),
            target_sizes=_given(args, {f"target_{name}": size for name, size in _SIZES.items()}),
            stage_layers=args.pipeline_model_parallel_blocks or (),
            target_stage_layers=args.target_pipeline_model_parallel_blocks or (),
            numbers=_given(args, {name: name for name in (*NUMBERS, "target_num_layers")}),
            only_tp=args.tensor_generate_layer,
            only_pp=args.pipeline_generate_layer,
            weights_only=args.no_load_optim,
            **running.how(args),
        )
    )
    ignored = [f"not needed: {shorten_names(others)}"] if others else []
    return running.tell(replace(report, lines=[*ignored, *report.lines]))


def _given(args: argparse.Namespace, names: dict[str, str]) -> dict[str, int]:
    """Those of the flags that were given, by what they are called here."""
    return {ours: value for name, ours in names.items() if (value := getattr(args, name))}


if __name__ == "__main__":
    sys.exit(main())
