"""What metaseq's own scripts take and give, for the entry points named after them: globs in, files
beside others out."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

from parammap.checkpoint.manifest import MANIFEST
from parammap.cli import running
from parammap.errors import RefusedError, TaskError, told
from parammap.execute.durable import sync
from parammap.frameworks.metaseq.target import Options
from parammap.job.conversion import convert
from parammap.job.request import Report, Request

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
#: a switch that several scripts have: flag, default, help
DROP_LOADER = (
    "--drop-metaseq-req",
    False,
    "leave out the data loader's state, which needs metaseq to load",
)
#: what follows a checkpoint's name in the names of its files (metaseq, checkpoint_utils.py)
_SUFFIX = re.compile(r"(?:-model_part-(\d+))?(?:-shard\d+)?\.pt$")


@dataclass(frozen=True, slots=True)
class NamedFiles:
    """Checkpoint files: the folder and name they have in common, and their parts, empty where they
    name none."""

    source: Path
    parts: frozenset[int]


def files_of(pattern: str) -> NamedFiles:
    """The one checkpoint that a glob matches. Raises RefusedError if there is none, or several."""
    found = [(path, _SUFFIX.search(path)) for path in sorted(glob(pattern))]
    names = sorted({path[: match.start()] for path, match in found if match})
    if not names:
        raise RefusedError(f"{pattern}: matches no .pt file; check the path")
    if len(names) > 1:
        shown = ", ".join(map(os.path.basename, names))
        raise RefusedError(
            f"{pattern}: matches files of {len(names)} checkpoints: {shown}; name one of them"
        )
    return NamedFiles(
        Path(names[0]), frozenset(int(match[1]) for _, match in found if match and match[1])
    )


def boolean(text: str) -> bool:
    """A flag's value as the scripts' users write it."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1")


def add_switch(parser: argparse.ArgumentParser, flag: str, default: bool | None, what: str) -> None:
    """A flag that may stand alone or be followed by True or False."""
    parser.add_argument(
        flag, type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=what
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """What all of these entry points have beside the scripts' own flags."""
    add = parser.add_argument
    add(
        "--sidecar",
        type=Path,
        metavar="DIR",
        help="where layout_*.json are, if not beside the checkpoint",
    )
    add(
        "--metadata-from",
        type=Path,
        metavar="SRC",
        help="what flat files without shard_metadata were made from",
    )
    running.add_arguments(parser, "parts", "files of the same names")


def write(
    args: argparse.Namespace,
    files: NamedFiles,
    output: Path,
    options: Options,
    *,
    only: frozenset[int] = frozenset(),
    parts: int | None = None,
    shards: int | None = None,
    weights_only: bool = False,
    ema: bool = False,
) -> int:
    """Convert into files called `output`, a path with the placeholders of Options.name; returns the
    exit status."""
    sizes = {name: size for name, size in (("tp", parts), ("dp", shards)) if size}
    report = convert_into(
        Request(
            source=files.source,
            target=output.parent,
            to="metaseq",
            sizes=sizes,
            only_tp=only,
            sidecar=args.sidecar,
            metadata_from=args.metadata_from,
            ema=ema,
            options=replace(options, name=output.name),
            weights_only=weights_only,
            beside_source=True,
            **running.how(args),
        )
    )
    return running.tell(report)


def convert_into(request: Request) -> Report:
    """Convert into a folder that may hold other files, which stay. Raises RefusedError if one of a
    name that is to be written is there."""
    folder = request.target
    if request.dry_run or not folder.is_dir() or not any(folder.iterdir()):
        return convert(request)
    (part,) = request.only_tp if len(request.only_tp) == 1 else "*"
    pattern = re.sub(r"\{\w+\}", "*", request.options.name.replace("{part}", str(part)))
    made = folder / f".{pattern.replace('*', '')}.new"
    if (made / MANIFEST).is_file():  # of a run that was killed while it moved
        _move(made, folder, pattern)
    if not request.overwrite and (there := sorted(folder.glob(pattern))):
        raise RefusedError(
            f"{there[0]}: is there already; replace it with --overwrite, or choose another name"
        )
    report = convert(replace(request, target=made, overwrite=True))
    with told(TaskError, folder):
        _move(made, folder, pattern)
    return replace(report, lines=[line.replace(f"{made}", f"{folder}") for line in report.lines])


def _move(made: Path, folder: Path, pattern: str) -> None:
    """Move files one by one, the manifest last, under a name of its own."""
    for path in sorted(
        path for path in made.rglob("*") if path.is_file() and path.name != MANIFEST
    ):
        target = folder / path.relative_to(made)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
        sync(target.parent)
    os.replace(
        made / MANIFEST, folder / f"{pattern.replace('*', '').removesuffix('.pt')}.{MANIFEST}"
    )
    for path in sorted((path for path in made.rglob("*") if path.is_dir()), reverse=True):
        path.rmdir()
    made.rmdir()
    sync(folder)
