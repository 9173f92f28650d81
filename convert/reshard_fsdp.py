"""metaseq's reshard_fsdp: the shards of a part (or of all) to another number of shards, or to whole
tensors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parammap.cli import running
from parammap.cli.main import run
from parammap.cli.metaseq_scripts import (
    DROP_LOADER,
    DTYPES,
    add_common,
    add_switch,
    files_of,
    write,
)
from parammap.errors import RefusedError
from parammap.frameworks.flags import positive
from parammap.frameworks.metaseq.target import FLAT, WHOLE, Options


def main(argv: Sequence[str] | None = None) -> int:
    parser = running.script_parser(__doc__)
    add = parser.add_argument
    add("--input", required=True, help="shards, as in 'raw/checkpoint_last-model_part-0-shard*.pt'")
    add("--output", required=True, help="paths, with {i} for the shard and {part} for the part")
    add("--num-output-shards", type=positive, default=1, metavar="N", help="(default: %(default)s)")
    whole = "whole tensors under their own names, for one shard (default: then True)"
    add_switch(parser, "--unflatten-weights", None, whole)
    add_switch(parser, "--skip-optimizer-state", False, "the weights alone")
    add("--output-dtype", choices=DTYPES, help="dtype of the weights (default: as they are)")
    add_switch(parser, *DROP_LOADER)
    add_common(parser)
    return run(lambda: _reshard(parser.parse_args(argv)))


def _reshard(args: argparse.Namespace) -> int:
    whole = (
        args.num_output_shards == 1 if args.unflatten_weights is None else args.unflatten_weights
    )
    if whole and args.num_output_shards > 1:
        raise RefusedError(
            "--unflatten-weights: one shard alone can hold whole tensors; leave it out"
        )
    files = files_of(args.input)
    name = args.output.replace("{i}", "{shard}")
    only = files.parts if len(files.parts) == 1 else frozenset()
    for part in only:
        name = name.replace(f"model_part-{part}", "model_part-{part}")
    options = Options(
        WHOLE if whole else FLAT, dtype=DTYPES.get(args.output_dtype), plain=args.drop_metaseq_req
    )
    return write(
        args,
        files,
        Path(name),
        options,
        only=only,
        shards=args.num_output_shards,
        weights_only=args.skip_optimizer_state,
    )


if __name__ == "__main__":
    sys.exit(main())
