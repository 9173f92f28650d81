"""metaseq's two reshard_mp: another number of parts (--num-output-parts), of shards
(--target-ddp-size), or both.

With --input and --output as the newer script has them, or SAVE_PREFIX SAVE_DIR as the one of 2022.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parammap.cli import running
from parammap.cli.main import run
from parammap.cli.metaseq_scripts import DTYPES, NamedFiles, add_common, add_switch, files_of, write
from parammap.errors import RefusedError
from parammap.frameworks.flags import positive
from parammap.frameworks.metaseq.target import FLAT, WHOLE, Options


def main(argv: Sequence[str] | None = None) -> int:
    parser = running.script_parser(__doc__)
    add = parser.add_argument
    add("save_prefix", nargs="?", help="how the shards' paths begin, as in raw/checkpoint_last")
    add("save_dir", nargs="?", type=Path, help="the folder of reshard-model_part-P[-shardR].pt")
    add("--input", help="a glob of parts, or of shards, as in 'opt/reshard-model_part-*.pt'")
    add("--output", help="their paths, {i} standing for the part and {shard} for the shard")
    parts, shards = "(default: 1 with --input, else as they are)", "flat parameters in N shards"
    add("--num-output-parts", type=positive, metavar="N", help=parts)
    add("--target-ddp-size", type=positive, metavar="N", help=f"{shards} (default: whole tensors)")
    add("--part", type=int, metavar="N", help="this part of the output alone")
    weights = "the weights alone; whole tensors always go alone"
    add_switch(parser, "--drop-optimizer-state", False, weights)
    add("--output-dtype", choices=DTYPES, help="dtype of the weights (default: as they are)")
    add_common(parser)
    return run(lambda: _reshard(parser.parse_args(argv)))


def _reshard(args: argparse.Namespace) -> int:
    files, output, parts = _newer(args) if args.input else _older(args)
    form = FLAT if args.target_ddp_size else WHOLE
    return write(
        args,
        files,
        output,
        Options(form, dtype=DTYPES.get(args.output_dtype)),
        parts=parts,
        only=frozenset() if args.part is None else frozenset([args.part]),
        shards=args.target_ddp_size,
        weights_only=form == WHOLE or args.drop_optimizer_state,
    )


def _newer(args: argparse.Namespace) -> tuple[NamedFiles, Path, int | None]:
    if args.save_prefix or not args.output:
        raise RefusedError("--input: goes with --output, and without SAVE_PREFIX and SAVE_DIR")
    output = Path(args.output.replace("{i}", "{part}"))
    return files_of(args.input), output, args.num_output_parts or 1


def _older(args: argparse.Namespace) -> tuple[NamedFiles, Path, int | None]:
    if args.save_dir is None or args.output:
        raise RefusedError("name --input and --output, or SAVE_PREFIX and SAVE_DIR")
    args.target_ddp_size = args.target_ddp_size or 512
    shard = "-shard{shard}" if args.target_ddp_size > 1 else ""
    output = args.save_dir / f"reshard-model_part-{{part}}{shard}.pt"
    return files_of(f"{args.save_prefix}-model_part-*.pt"), output, args.num_output_parts


if __name__ == "__main__":
    sys.exit(main())
