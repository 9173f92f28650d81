"""`parammap inspect CKPT`: say what a checkpoint is, from its headers and sidecar; as text, JSON or
a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from parammap.cli import reading as reading_flags
from parammap.errors import RefusedError
from parammap.inspection import html, text
from parammap.inspection.facts import inspect
from parammap.inspection.reading import read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    reading_flags.add_checkpoint(parser)
    reading_flags.add_arguments(parser)
    add(
        "--tensors",
        action="store_true",
        help="the tree of tensors: shape, dtype, split, and each rank's name for it",
    )
    add("--json", action="store_true", help="the facts as JSON")
    add(
        "--html",
        type=Path,
        metavar="FILE",
        help="draw the layout and the optimizer's buffers, in one HTML file",
    )


def run(args: argparse.Namespace) -> int:
    reading = read(
        args.checkpoint,
        iteration=args.iteration,
        sidecar=args.sidecar,
        metadata_from=args.metadata_from,
    )
    facts = inspect(reading, tensors=args.tensors)
    if args.html:
        _write(args.html, html.page(facts))
    print(json.dumps(facts, indent=1) if args.json else "\n".join(text.lines(facts)))
    return 0


def _write(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RefusedError(
            f"{path}: cannot be written ({error.strerror}); name a file in a folder that exists"
        ) from None
