"""What Yuan-2.0's split_tp, merge_tp and merge_pp tools do, in one step, with the flags that their
users know.

A size that is left out is the source's. Flags that only describe the model are not needed; a number
that contradicts the checkpoint is an error. As documented by Yuan-2.0, flags may have dashes at
their end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parammap.arguments import positive
from parammap.cli.main import run
from parammap.job.repartition import NUMBERS, SIZES, repartition
from parammap.plan.planner import FIRST, MEAN, REFUSE


def main(argv: Sequence[str] | None = None) -> int:
    argv = [
        arg.rstrip("-") if arg.startswith("--") else arg
        for arg in (sys.argv[1:] if argv is None else argv)
    ]
    args, others = _parser().parse_known_args(argv)
    return run(
        lambda: repartition(
            args, [other.partition("=")[0] for other in others if other.startswith("--")]
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    for flags, kind, what in (
        (("--load", "--save"), Path, "the checkpoint to read, the folder to make"),
        (
            [f"--{name}" for name in (*SIZES.values(), *NUMBERS, "target_num_layers")],
            positive,
            "checked where given",
        ),
        (
            [f"--target_{name}" for name in SIZES.values()],
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
    parser.add_argument(
        "--workers", type=positive, default=2, help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--replicas",
        choices=[REFUSE, FIRST, MEAN],
        default=REFUSE,
        help="what to take where ranks keep different copies (default: %(default)s)",
    )
    for flag, what in (
        ("--no-load-optim", "the weights alone"),
        ("--overwrite", "replace what the folder to make holds"),
        ("--process-checkpoint", "does nothing here"),
    ):
        parser.add_argument(flag, action="store_true", help=what)
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
