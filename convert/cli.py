"""The command line `parammap`: flags in, exit status out (0 done, 1 differences found, 2 refused, 3 a task failed)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from . import __version__
from .errors import RefusedError, TaskError
from .frameworks import mindspore
from .job import Request, convert

SIZES = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual pipeline", "ep": "expert", "etp": "expert tensor",
         "cp": "context", "dp": "data"}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return run(lambda: args.command(args))


def run(command) -> int:
    """Run a command that returns an exit status; errors that a user can act on become one line and a status."""
    try:
        return command()
    except RefusedError as error:
        print(f"parammap: {error}", file=sys.stderr)
        return 2
    except TaskError as error:
        print(f"parammap: {error}; nothing was published, and the same command goes on from here", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("parammap: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="parammap", description="Move a training state between frameworks, exactly.")
    parser.add_argument("--version", action="version", version=f"parammap {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(commands.add_parser("convert", allow_abbrev=False, help="write a checkpoint for another framework"))
    return parser


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.set_defaults(command=_convert)
    add("source", type=Path, metavar="SRC", help="a save folder, or one of its iteration folders")
    add("target", type=Path, metavar="DST", help="the folder to make")
    add("--to", required=True, choices=["mindspore"], help="the framework to write for")
    add("--iteration", type=int, metavar="N", help="the iteration to take (default: the latest)")
    add("--sidecar", type=Path, metavar="DIR", help="where param_map*.json or layout_*.json are")
    add("--weights-only", action="store_true", help="take the weights of model_optim_rng.pt, no optimizer state")
    add("--dtype", choices=["float32"], help="cast the weights (with --weights-only; default: as on disk)")
    add("--format", choices=sorted(mindspore.FRAMES), default="ckpt", help="file format (default: %(default)s)")
    add("--names", choices=mindspore.NAMES, default="mindspore", help="whose tensor names (default: %(default)s)")
    add("--file-prefix", default="network", metavar="NAME", help="file name without ending (default: %(default)s)")
    add("--generate-all-dp-cp", action="store_true", help="a file for every rank, as hard links where possible")
    add("--drop", action="append", choices=["experts"], default=[], help="leave these tensors out")
    add("--accept-stale", action="store_true", help="status 0 although the model's own copy is older than the optimizer's")
    add("--accept-permuted", action="store_true", help="convert although optimizer slices are permuted")
    add("--overwrite", action="store_true", help="replace an output folder that has content")
    add("--dry-run", action="store_true", help="print what would be written, and write nothing")
    add("--workers", type=positive, default=min(2, os.cpu_count() or 1), metavar="N", help="processes (default: %(default)s)")
    sizes = parser.add_argument_group("layout of the output (default: the source's)")
    for name, what in SIZES.items():
        sizes.add_argument(f"--{name}", type=positive, metavar="N", help=f"{what} parallel size")
    sizes.add_argument("--stage-layers", type=_layers, default=(), metavar="N,N,…", help="layers of each pipeline stage")


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _convert(args: argparse.Namespace) -> int:
    if args.dtype and not args.weights_only:
        raise RefusedError("--dtype: an optimizer's states keep their dtype; it goes with --weights-only")
    sizes = {name: value for name in SIZES if (value := getattr(args, name)) is not None}
    report = convert(Request(
        source=args.source, target=args.target, to=args.to, sizes=sizes, stage_layers=args.stage_layers,
        output=mindspore.Options(args.format, args.names, args.file_prefix, cast=args.dtype,
                                 all_dp_cp=args.generate_all_dp_cp),
        iteration=args.iteration, sidecar=args.sidecar, weights_only=args.weights_only, drop=frozenset(args.drop),
        accept_stale=args.accept_stale, accept_permuted=args.accept_permuted, overwrite=args.overwrite,
        dry_run=args.dry_run, workers=args.workers))
    print("\n".join(report.lines))
    return report.status
