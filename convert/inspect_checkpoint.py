"""Say what a checkpoint holds: its files, its layout, and each tensor's name, shape, dtype and sum
of values."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parammap.cli import running
from parammap.cli.main import run
from parammap.errors import RefusedError
from parammap.execute.gather import Files
from parammap.inspection import values
from parammap.inspection.reading import read


def main(argv: Sequence[str] | None = None) -> int:
    parser = running.script_parser(__doc__)
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="a checkpoint's folder, or one of its files"
    )
    return run(lambda: _inspect(parser.parse_args(argv).checkpoint))


def _inspect(checkpoint: Path) -> int:
    if checkpoint.is_dir():
        known = read(checkpoint).best
        print(
            f"{known.folder}: {known.framework}, iteration {known.iteration}, "
            f"{known.trained or known.layout}, {known.num_layers} layers"
        )
        files = sorted(path for path in known.folder.rglob("*") if path.is_file())
    elif checkpoint.is_file():
        files = [checkpoint]
    else:
        raise RefusedError(f"{checkpoint}: no such file or folder; check the path")
    for file in files:
        print("\n".join(_lines(file, file == checkpoint)))
    return 0


def _lines(file: Path, is_asked_for: bool) -> Iterator[str]:
    """A file's size and, if it is one of tensors, or the one asked for, what it holds."""
    entries = values.entries_of(file) if is_asked_for or values.holds_tensors(file) else []
    yield f"{file}: {file.stat().st_size:,} bytes, {len(entries)} tensors"
    with Files() as opened:
        for name, stored in entries:
            total = values.total(stored, opened)
            odd = f", {total.non_finite} not finite" if total.non_finite else ""
            yield f"  {name} {list(stored.shape)} {stored.dtype} sum {total.sum:.9g}{odd}"


if __name__ == "__main__":
    sys.exit(main())
