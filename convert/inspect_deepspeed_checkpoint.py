"""Say what a DeepSpeed checkpoint holds: layout, files, and each layer's tensors by name, shape,
dtype and sum of values."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parammap.cli import running
from parammap.cli.main import run
from parammap.errors import RefusedError
from parammap.execute.gather import Files
from parammap.frameworks.deepspeed import files, reader
from parammap.inspection import values


def main(argv: Sequence[str] | None = None) -> int:
    parser = running.script_parser(__doc__)
    parser.add_argument(
        "named", nargs="?", type=Path, metavar="FOLDER", help="a save folder, or that of one step"
    )
    parser.add_argument("--folder", type=Path, help="the same")
    return run(lambda: _inspect(parser.parse_args(argv)))


def _inspect(args: argparse.Namespace) -> int:
    folder = args.folder or args.named
    if folder is None or args.folder and args.named:
        raise RefusedError("FOLDER: name one checkpoint")
    checkpoint, there = reader.read(folder), files.find(folder)
    layout = checkpoint.layout
    print(
        f"{checkpoint.folder}: iteration {checkpoint.iteration}, {checkpoint.num_layers} layers, "
        f"tp {layout.tp}, "
        f"pp {layout.pp} (layers per stage {checkpoint.stage_layers()}), dp {layout.dp}"
    )
    for kind, paths in (("layer", there.layers), ("mp rank", there.models), ("zero", there.shards)):
        print(f"{len(paths)} {kind} files")
        for _, path in sorted(paths.items()):
            print("\n".join(_lines(path, kind != "zero")))
    return 0


def _lines(path: Path, is_model: bool) -> Iterator[str]:
    """A file's size and what it holds; of an optimizer's shard, how many tensors."""
    entries = values.entries_of(path)
    yield f"{path.name}: {path.stat().st_size:,} bytes, {len(entries)} tensors"
    with Files() as opened:
        for name, stored in entries if is_model else ():
            yield f"  {name} {list(stored.shape)} {stored.dtype} sum {values.total(stored, opened).sum:.9g}"


if __name__ == "__main__":
    sys.exit(main())
