"""What Yuan-2.0's split_tp, merge_tp and merge_pp tools do, in one step, with the flags that their
users know.

A size that is left out is the source's. Flags that only describe the model are not needed; a number
that contradicts the checkpoint is an error. As documented by Yuan-2.0, flags may have dashes at
their end."""

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
from parammap.frameworks.flags import positive
from parammap.job.repartition import NUMBERS, Repartition, repartition
from parammap.tensors.names import shorten_names

_SIZES = {"tensor_model_parallel_size": "tp", "pipeline_model_parallel_size": "pp"}
#: what is in the names of flags that say what to do, not what the model is like
_OURS = re.compile("target|generate|parallel-(size|blocks)")


def main(argv: Sequence[str] | None = None) -> int:
    argv = [
        arg.rstrip("-") if arg.startswith("--") else arg
        for arg in (sys.argv[1:] if argv is None else argv)
    ]
    args, others = _parser().parse_known_args(argv)
    flags = [other.partition("=")[0] for other in others if other.startswith("--")]
    return run(lambda: _repartition(args, flags))


def _repartition(args: argparse.Namespace, others: list[str]) -> int:
    if unknown := [flag for flag in others if _OURS.search(flag)]:
        raise RefusedError(
            f"{shorten_names(unknown)}: no such flag; --help lists those that there are"
        )
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
            replicas=args.replicas,
            workers=args.workers,
            overwrite=args.overwrite,
            dry_run=args.dry_run,
        )
    )
    ignored = [f"not needed: {shorten_names(others)}"] if others else []
    return running.tell(replace(report, lines=[*ignored, *report.lines]))


def _given(args: argparse.Namespace, names: dict[str, str]) -> dict[str, int]:
    """Those of the flags that were given, by what they are called here."""
    return {ours: value for name, ours in names.items() if (value := getattr(args, name))}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    for flags, kind, what in (
        (("--load", "--save"), Path, "the checkpoint to read, the folder to make"),
        (
            [f"--{name}" for name in (*_SIZES, *NUMBERS, "target_num_layers")],
            positive,
            "checked where given",
        ),
        (
            [f"--target_{name}" for name in _SIZES],
            positive,
            "of the output (default: the source's)",
        ),
        (
            ["--pipeline-model-parallel-blocks"],
            _numbers,
            "layers of each source stage: checked where given",
        ),
        (["--target-pipeline-model-parallel-blocks"], _numbers, "layers of each output stage"),
        (
            ["--pipeline-generate-layer", "--tensor-generate-layer"],
            _numbers,
            "the ranks to write (default: all)",
        ),
    ):
        for flag in flags:
            parser.add_argument(flag.replace("_", "-"), type=kind, required=kind is Path, help=what)
    running.add_arguments(parser)
    for flag, what in (
        ("--no-load-optim", "the weights alone"),
        ("--process-checkpoint", "does nothing here"),
    ):
        parser.add_argument(flag, action="store_true", help=what)
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
