"""`combine_ckpt_dp_zero.py`, with the flags that users of MindSpeed-Core-MS's tool of that name
know.

Per data parallel group, the newest files of its ranks, which hold parts of flat buckets, become one
file that holds each parameter's weight and moments under its own name: `rank_N/<name of rank N's
file>_dp_merged.<format>` for the group's first rank N. The output folder may be that of the
checkpoint: files are added to it, all or none, and never replaced."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parammap.cli import running
from parammap.cli.main import run
from parammap.frameworks.flags import positive
from parammap.frameworks.mindspore.formats import FORMATS
from parammap.job.combine_shards import Combination, combine


def main(argv: Sequence[str] | None = None) -> int:
    parser, output = running.script_parser(__doc__), Path("output")
    add, default = parser.add_argument, "(default: %(default)s)"
    strategies = f"where rank_N/dist_opt_shard_info_rank_N-0_0.json are {default}"
    add("--strategy-dir", type=Path, default=output / "opt_shard_info", help=strategies)
    add("--checkpoint-dir", type=Path, default=output, help=f"where rank_N/ are {default}")
    add("--output-dir", type=Path, default=output, help=f"may be the same folder {default}")
    for flag, what in (("--src-format", "read"), ("--dst-format", "write")):
        help = f"format to {what} {default}"
        add(flag, default="ckpt", choices=sorted(FORMATS), help=help)
    add("--copy-to-all-dp-ranks", action="store_true", help="a file, or a link, for every rank")
    add("--max-proccess-limit", type=positive, default=8, help=f"worker processes {default}")
    groups = "groups whose first rank is there"
    add("--rank-section", type=int, nargs=2, metavar=("FIRST", "END"), help=groups)
    add("--no-save-optim", action="store_true", help="weights only")
    return run(lambda: _combine(parser.parse_args(argv)))


def _combine(args: argparse.Namespace) -> int:
    lines = combine(
        Combination(
            strategy_dir=args.strategy_dir,
            checkpoint_dir=args.checkpoint_dir,
            output_dir=args.output_dir,
            source_format=args.src_format,
            target_format=args.dst_format,
            ranks=args.rank_section and tuple(args.rank_section),
            for_all_ranks=args.copy_to_all_dp_ranks,
            weights_only=args.no_save_optim,
            workers=args.max_proccess_limit,
        )
    )
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
