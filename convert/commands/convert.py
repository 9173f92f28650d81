"""`parammap convert SRC DST --to FRAMEWORK`: write a checkpoint for another framework."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import RefusedError
from ..frameworks.alpa import serving as alpa
from ..frameworks.alpa import training as alpa_training
from ..frameworks.metaseq import target as metaseq_target
from ..frameworks.mindspore import target as mindspore
from ..job import TARGETS, convert
from ..planner import FIRST, MEAN, REFUSE
from ..request import Request
from . import positive

SIZES = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual pipeline", "ep": "expert", "etp": "expert tensor",
         "cp": "context", "dp": "data"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="a save folder, or one of its iteration folders")
    add("target", type=Path, metavar="DST", help="the folder to make")
    add("--to", required=True, choices=sorted(TARGETS), help="the framework to write for")
    add("--iteration", type=int, metavar="N", help="the iteration to take (default: the latest)")
    add("--sidecar", type=Path, metavar="DIR", help="where param_map*.json or layout_*.json are")
    add("--metadata-from", type=Path, metavar="DIR", help="shards whose metadata describes metaseq files that lost it")
    add("--weights-only", action="store_true", help="take the weights of model_optim_rng.pt, no optimizer state")
    add("--dtype", choices=["float32", "float16", "bfloat16"],
        help="cast the weights (default: as on disk; float16 for alpa; MindSpore: float32, with --weights-only)")
    add("--form", choices=sorted(metaseq_target.NAMES), default=metaseq_target.FLAT,
        help="of metaseq's files: flat parameters, whole tensors, or one file for all (default: %(default)s)")
    add("--vocab-size", type=positive, metavar="N", help="rows of the word embedding for Alpa (default: the source's)")
    add("--activation", choices=["relu", "gelu"], help="of a source that does not record it, for Alpa")
    add("--format", choices=sorted(mindspore.FRAMES), default="ckpt", help="file format (default: %(default)s)")
    add("--names", choices=mindspore.NAMES, default="mindspore", help="whose tensor names (default: %(default)s)")
    add("--file-prefix", default="network", metavar="NAME", help="file name without ending (default: %(default)s)")
    add("--generate-all-dp-cp", action="store_true", help="a file for every rank, as hard links where possible")
    add("--drop", action="append", choices=["experts"], default=[], help="leave these tensors out")
    add("--accept-stale", action="store_true", help="status 0 although the model's own copy is older than the optimizer's")
    add("--accept-permuted", action="store_true", help="convert although optimizer slices are permuted")
    add("--overwrite", action="store_true", help="replace an output folder that has content")
    add("--dry-run", action="store_true", help="print what would be written, and write nothing")
    add("--workers", type=positive, default=min(2, os.cpu_count() or 1), metavar="N",
        help="processes (default: %(default)s)")
    add("--ray", metavar="ADDRESS", help="run on this Ray cluster instead: auto, HOST:PORT or ray://HOST:PORT")
    sizes = parser.add_argument_group("layout of the output (default: the source's)")
    for name, what in SIZES.items():
        sizes.add_argument(f"--{name}", type=positive, metavar="N", help=f"{what} parallel size")
    sizes.add_argument("--stage-layers", type=_layers, default=(), metavar="N,N,…",
                       help="layers of each pipeline stage, or of each chunk in the order in which data passes them")
    sizes.add_argument("--make-vocab-size-divisible-by", type=positive, metavar="N",
                       help="pad the vocabulary's rows to a multiple of this times tp")
    sizes.add_argument("--replicas", choices=[REFUSE, FIRST, MEAN], default=REFUSE,
                       help="what to take in another layout where ranks keep different copies (default: %(default)s)")


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers N,N,…") from error


def run(args: argparse.Namespace) -> int:
    if args.dtype and args.to in ("mindspore", "megatron", "megatron-dist") and not (
            args.to == "mindspore" and args.weights_only and args.dtype == "float32"):
        raise RefusedError(f"--dtype {args.dtype}: an optimizer's states keep their dtype; float32 goes with --to mindspore "
                           "--weights-only, others with metaseq and alpa")
    sizes = {name: value for name in SIZES if (value := getattr(args, name)) is not None}
    report = convert(Request(
        source=args.source, target=args.target, to=args.to, sizes=sizes, stage_layers=args.stage_layers,
        vocab_divisible_by=args.make_vocab_size_divisible_by, replicas=args.replicas,
        output=mindspore.Options(args.format, args.names, args.file_prefix, all_dp_cp=args.generate_all_dp_cp,
                                 cast=args.dtype if args.to == "mindspore" else None),
        metaseq=metaseq_target.Options(args.form, cast=args.dtype),
        alpa=alpa.Options(args.dtype or "float16", args.vocab_size, args.activation),
        alpa_training=alpa_training.Options(args.dtype or "float32", vocab_size=args.vocab_size,
                                            activation=args.activation),
        iteration=args.iteration, sidecar=args.sidecar, metadata_from=args.metadata_from,
        weights_only=args.weights_only, drop=frozenset(args.drop),
        accept_stale=args.accept_stale, accept_permuted=args.accept_permuted, overwrite=args.overwrite,
        dry_run=args.dry_run, workers=args.workers, ray=args.ray))
    print("\n".join(report.lines))
    return report.status
