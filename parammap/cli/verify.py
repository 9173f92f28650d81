"""`parammap verify OUT [--against SRC] [--replicas]`: read a checkpoint again and prove it, or say
what is wrong; repair."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parammap.cli import reading
from parammap.cli.positions import positions
from parammap.errors import RefusedError
from parammap.proof.compare import Difference
from parammap.proof.repair import repair
from parammap.proof.verify import Verdict, Verification, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "output",
        type=Path,
        metavar="OUT",
        help="what a conversion wrote; with --replicas or --against, any checkpoint",
    )
    add(
        "--against",
        type=Path,
        metavar="SRC",
        help="the source: compare element by element, say where and by how much",
    )
    add(
        "--cast",
        choices=["float32", "bfloat16", "float16"],
        help="weights of OUT were cast to this dtype",
    )
    add(
        "--replicas",
        action="store_true",
        help="list the tensors of which ranks keep copies that are not equal, and where",
    )
    add("--repair", action="store_true", help="write the wrong tensors' bytes anew from SRC")
    add("--into", type=Path, metavar="COPY", help="repair a copy of OUT, to be made here")
    add("--in-place", action="store_true", help="repair OUT itself")
    reading.add_arguments(parser, "SRC, or of OUT without one,")
    reading.add_metadata(add, "OUT", prefix="output-")
    reading.add_common(parser)


def run(args: argparse.Namespace) -> int:
    if args.repair and (not args.against or bool(args.into) == args.in_place):
        raise RefusedError("--repair: needs --against SRC, and either --into COPY or --in-place")
    if not args.repair and (args.into or args.in_place):
        raise RefusedError("--into and --in-place say where to --repair; give that as well")
    request = Verification(
        output=args.output,
        against=args.against,
        output_metadata_from=args.output_metadata_from,
        **reading.how(args),
        cast=args.cast,
        replicas=args.replicas,
        workers=args.workers,
    )
    verdict, output = verify(request), args.output
    if args.repair and verdict.problems:
        if not args.json:
            _show(verdict, args, output)
        verdict, output = repair(request, verdict, args.into), args.into or output
    _show(verdict, args, output)
    return 1 if verdict.problems else 0


def _show(verdict: Verdict, args: argparse.Namespace, output: Path) -> None:
    if args.json:
        replicas = (
            {"replicas": [_entry(found) for found in verdict.unequal]} if args.replicas else {}
        )
        print(
            json.dumps(
                {
                    "output": str(output),
                    "problems": [asdict(problem) for problem in verdict.problems],
                    **replicas,
                    "notes": verdict.notes,
                    "tensors_compared": len(verdict.compared),
                    "bytes_covered": verdict.coverage.nbytes,
                },
                indent=1,
            )
        )
        return
    for line in (*verdict.problems, *verdict.notes):
        print(line)
    print(
        f"{output}: {len(verdict.problems) or 'no'} problems; {len(verdict.compared)} tensors "
        f"compared; {verdict.coverage}"
    )


def _entry(found: Difference) -> dict[str, Any]:
    """`a` and `b` are two ranks' copies of one tensor."""
    return {
        "name": found.a.name,
        "role": found.a.state,
        "elements": found.elements,
        "largest_difference": found.largest,
        "first": positions(found),
    }
