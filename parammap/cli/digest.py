"""`parammap digest CKPT`: the digest of each logical tensor, the same in every framework, layout
and file format."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from parammap.checkpoint.manifest import TensorDigest
from parammap.cli import reading
from parammap.errors import RefusedError
from parammap.proof.digests import tensor_digests


def add_arguments(parser: argparse.ArgumentParser) -> None:
    reading.add_checkpoint(parser)
    reading.add_arguments(parser)
    reading.add_common(parser)


def run(args: argparse.Namespace) -> int:
    checkpoint = reading.read(args.checkpoint, args)
    found = tensor_digests(checkpoint.index, args.workers)
    if not found:
        raise RefusedError(f"{args.checkpoint}: holds no tensor")
    if args.json:
        facts = {
            "checkpoint": str(checkpoint.folder),
            "framework": checkpoint.framework,
            "iteration": checkpoint.iteration,
            "digests": [one.to_json() for one in found],
        }
        print(json.dumps(facts, indent=1))
    else:
        print("\n".join(_lines(found)))
    return 1 if any(one.others for one in found) else 0


def _lines(found: list[TensorDigest]) -> Iterator[str]:
    for one in found:
        yield f"{one.digest}  {one.state:12}  {one.dtype:8}  {one.name} {list(one.shape)}"
    for one in found:
        if one.others:
            yield (
                f"{one.name} ({one.state}): the ranks' copies differ: {', '.join(one.others)} as "
                "well"
            )
