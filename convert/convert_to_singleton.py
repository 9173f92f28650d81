"""metaseq's convert_to_singleton: the parts in LOCATION, with or without shards, to one
restored.pt."""

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
    NamedFiles,
    add_common,
    add_switch,
    files_of,
    write,
)
from parammap.frameworks.metaseq.target import NAMES, SINGLETON, Options

#: what metaseq calls the architecture of what it restores
_ARCH = "transformer_lm_megatron"
#: the parts, merged by metaseq's tools (of which it takes these alone) or as training left them
_PATTERNS = ("reshard*.pt", "*-model_part-*.pt", "*-shard*.pt")


def main(argv: Sequence[str] | None = None) -> int:
    parser = running.script_parser(__doc__)
    add = parser.add_argument
    add("location", type=Path, help="the folder with the parts: reshard*.pt, or else raw ones")
    add("--output-dtype", choices=DTYPES, help="dtype of the weights (default: as they are)")
    add_switch(parser, *DROP_LOADER)
    add_common(parser)
    return run(lambda: _convert(parser.parse_args(argv)))


def _convert(args: argparse.Namespace) -> int:
    options = Options(
        SINGLETON, dtype=DTYPES.get(args.output_dtype), arch=_ARCH, plain=args.drop_metaseq_req
    )
    return write(
        args,
        _files(args.location),
        args.location / NAMES[SINGLETON],
        options,
        parts=1,
        weights_only=True,
    )


def _files(location: Path) -> NamedFiles:
    """The parts in a folder. Raises RefusedError if there are none, or those of several
    checkpoints."""
    pattern = next((pattern for pattern in _PATTERNS if any(location.glob(pattern))), _PATTERNS[0])
    return files_of(f"{location}/{pattern}")


if __name__ == "__main__":
    sys.exit(main())
