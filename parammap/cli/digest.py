"""`parammap digest CKPT`: the digest of each logical tensor, the same in every framework, layout
and file format."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from parammap.cli import reading
from parammap.errors import RefusedError
from parammap.proof import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CKPT",
        help="a save folder, or one of its iteration folders",
    )
    reading.add_arguments(parser)
    reading.add_common(parser)


def run(args: argparse.Namespace) -> int:
    checkpoint = reading.read(args.checkpoint, args)
    entries = [
        _entry(tensor, summed)
        for tensor, summed in verify.digests(checkpoint.index, args.workers).items()
    ]
    if not entries:
        raise RefusedError(f"{args.checkpoint}: holds no tensor")
    differing = [entry for entry in entries if entry["digests_of_other_copies"]]
    if args.json:
        print(
            json.dumps(
                {
                    "checkpoint": str(checkpoint.folder),
                    "framework": checkpoint.framework,
                    "iteration": checkpoint.iteration,
                    "digests": entries,
                },
                indent=1,
            )
        )
    else:
        print(
            "\n".join(
                f"{e['digest']}  {e['role']:12}  {e['dtype']:8}  {e['name']} {e['shape']}"
                for e in entries
            )
        )
        for e in differing:
            print(
                f"{e['name']} ({e['role']}): the ranks' copies differ: "
                f"{', '.join(e['digests_of_other_copies'])} as well"
            )
    return 1 if differing else 0


def _entry(tensor: verify.Tensor, summed: verify.Summed) -> dict:
    first, *others = summed.digests
    return {
        "role": tensor.role,
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "digest": f"{first:016x}",
        "digests_of_other_copies": [f"{one:016x}" for one in sorted({*others} - {first})],
    }
