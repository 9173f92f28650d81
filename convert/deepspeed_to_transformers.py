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

from parammap.arguments import positive
from parammap.cli.main import run
from parammap.frameworks.merak.target import Options
from parammap.job.conversion import convert
from parammap.job.request import Request
from parammap.plan.planner import FIRST, MEAN, REFUSE


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--input_folder",
        type=Path,
        required=True,
        help="a save folder of Megatron-DeepSpeed, or that of one step",
    )
    add("--output_folder", type=Path, required=True, help="the folder to make")
    add(
        "--merak_tp",
        type=positive,
        default=1,
        metavar="N",
        help="tensor parallel size of the output (default: 1)",
    )
    add(
        "--merak_pp",
        type=positive,
        default=1,
        metavar="N",
        help="pipeline parallel size of the output (default: 1)",
    )
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
    add(
        "--replicas",
        choices=[REFUSE, FIRST, MEAN],
        default=REFUSE,
        help="what to take where ranks keep different copies (default: %(default)s)",
    )
    add("--workers", type=positive, default=2, metavar="N", help="processes (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace an output folder that has content")
    return run(lambda: _convert(parser.parse_args(argv)))


def _convert(args: argparse.Namespace) -> int:
    report = convert(
        Request(
            source=args.input_folder,
            target=args.output_folder,
            to="merak",
            weights_only=True,
            sizes={"tp": args.merak_tp, "pp": args.merak_pp},
            replicas=args.replicas,
            workers=args.workers,
            overwrite=args.overwrite,
            options=Options(
                for_release=args.for_release, config=args.config, activation=args.activation
            ),
        )
    )
    print("\n".join(report.lines))
    return report.status


if __name__ == "__main__":
    sys.exit(main())
