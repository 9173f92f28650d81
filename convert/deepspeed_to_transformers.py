"""A Megatron-DeepSpeed checkpoint's GPT-2 as Merak's files in these degrees, under
OUTPUT_FOLDER/release.

So it is called by those who train with Merak; transformers' own files are what `parammap convert
--to transformers` makes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parammap.cli import running
from parammap.cli.main import run
from parammap.frameworks.merak.target import Options
from parammap.job.request import Request


def main(argv: Sequence[str] | None = None) -> int:
    parser = running.script_parser(__doc__)
    add = parser.add_argument
    add(
        "--input_folder",
        type=Path,
        required=True,
        help="a save folder of Megatron-DeepSpeed, or that of one step",
    )
    add("--output_folder", type=Path, required=True, help="the folder to make")
    running.add_merak_sizes(parser)
    add("--for_release", action="store_true", help="zero the counters of consumed samples")
    add(
        "--config",
        "--json_path",
        type=Path,
        metavar="CONFIG.JSON",
        help="a config.json that says what the checkpoint does not record",
    )
    add(
        "--activation", choices=["gelu", "gelu_new"], help="of a checkpoint that does not record it"
    )
    running.add_arguments(parser)
    return run(lambda: _convert(parser.parse_args(argv)))


def _convert(args: argparse.Namespace) -> int:
    return running.convert(
        Request(
            source=args.input_folder,
            target=args.output_folder,
            to="merak",
            weights_only=True,
            sizes={"tp": args.merak_tp, "pp": args.merak_pp},
            **running.how(args),
            options=Options(
                for_release=args.for_release, config=args.config, activation=args.activation
            ),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
