"""Merak's convert_merak_gpt2_checkpoint: GPT-2 to Merak in other degrees (merak,
transformers_to_merak), or to transformers.

--load_path is a folder of Merak, of Megatron or of transformers, or a transformers folder's
pytorch_model.bin. Merak files go to SAVE_PATH/release, but the one of tp 1 · pp 1 to
SAVE_PATH/iter_0000000_all_dp, where Merak looks for it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parammap.cli import running
from parammap.cli.main import run
from parammap.errors import RefusedError
from parammap.frameworks.flags import numbers
from parammap.frameworks.merak.partition import METHODS, UNIFORM
from parammap.frameworks.merak.target import Options
from parammap.frameworks.transformers import target as transformers
from parammap.job.request import Request

TO_TRANSFORMERS, FROM_TRANSFORMERS = "transformers", "transformers_to_merak"


def main(argv: Sequence[str] | None = None) -> int:
    parser = running.script_parser(__doc__)
    add = parser.add_argument
    add("--load_path", type=Path, required=True, help="its iteration's folder, or one above")
    add("--save_path", type=Path, required=True, help="the folder to make")
    add("--json_path", type=Path, help="a config.json: what the checkpoint does not record")
    add("--convert_type", required=True, choices=["merak", TO_TRANSFORMERS, FROM_TRANSFORMERS])
    running.add_merak_sizes(parser)
    add("--partition_method", choices=METHODS, default=UNIFORM, help="(default: %(default)s)")
    add("--custom_partition", type=numbers, default=(), help="0,N,…: where stages begin, and end")
    running.add_arguments(parser)
    return run(lambda: _convert(parser.parse_args(argv)))


def _convert(args: argparse.Namespace) -> int:
    to_transformers = args.convert_type == TO_TRANSFORMERS
    source = args.load_path.parent if args.load_path.is_file() else args.load_path
    if args.convert_type == FROM_TRANSFORMERS:
        _check_config(source, args.json_path)
    options = (
        transformers.Options(format=transformers.BIN)
        if to_transformers
        else Options(
            partition_method=args.partition_method,
            custom_partition=args.custom_partition,
            config=args.json_path,
        )
    )
    return running.convert(
        Request(
            source=source,
            target=args.save_path,
            to="transformers" if to_transformers else "merak",
            options=options,
            sizes={} if to_transformers else {"tp": args.merak_tp, "pp": args.merak_pp},
            weights_only=True,
            metadata_from=args.json_path if to_transformers else None,
            **running.how(args),
        )
    )


def _check_config(source: Path, given: Path | None) -> None:
    """A transformers folder is read with its own config.json."""
    own = source / "config.json"
    if given and not (own.is_file() and given.read_bytes() == own.read_bytes()):
        raise RefusedError(f"{given}: must be the config.json of {source}; copy it there")


if __name__ == "__main__":
    sys.exit(main())
