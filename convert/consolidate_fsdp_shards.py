"""metaseq's consolidate_fsdp_shards: the shards that begin with PREFIX to whole tensors, glued to
one part or by part."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parammap.cli import running
from parammap.cli.main import run
from parammap.cli.metaseq_scripts import add_common, add_switch, files_of, write
from parammap.frameworks.metaseq.target import SINGLETON, WHOLE, Options


def main(argv: Sequence[str] | None = None) -> int:
    parser = running.script_parser(__doc__)
    add = parser.add_argument
    add("prefix", help="how the shards' paths begin, as in raw/checkpoint_last")
    add("--save-prefix", help="how the output's path begins (default: PREFIX_consolidated)")
    add(
        "--new-arch-name",
        metavar="NAME",
        help="the architecture that the output's configuration names",
    )
    add("--megatron-part", type=int, metavar="N", help="this part alone")
    add_switch(parser, "--no-stitch-megatron", False, "a file for each part")
    add_switch(parser, "--is-ema", False, "the moving average of the weights that training kept")
    add_switch(parser, "--strict", True, "does nothing here: what is missing is always an error")
    add_common(parser)
    return run(lambda: _convert(parser.parse_args(argv)))


def _convert(args: argparse.Namespace) -> int:
    prefix = args.prefix.removesuffix(".pt")
    files = files_of(f"{prefix}*shard*.pt")
    save = args.save_prefix or f"{prefix}_consolidated"
    apart = args.no_stitch_megatron or args.megatron_part is not None
    only = frozenset() if args.megatron_part is None else frozenset([args.megatron_part])
    name = f"{save}-model_part-{{part}}.pt" if apart else f"{save}.pt"
    form = SINGLETON if files.parts and not apart else WHOLE
    return write(
        args,
        files,
        Path(name),
        Options(form, arch=args.new_arch_name),
        only=only,
        parts=None if apart else 1,
        weights_only=True,
        ema=args.is_ema,
    )


if __name__ == "__main__":
    sys.exit(main())
