"""Plans all of OPT-175B: what `parammap convert --to alpa --dry-run` needs for its 8 parts × 124
shards.

  python bench/plan_opt175b.py [--to alpa|alpa-training|metaseq] [--keep DIR] [FLAG …]

The files have the sizes and the shard metadata that the real ones have, and no content
(tests/support/opt175b.py). The dry run is a process of its own; its wall time and peak memory are
printed beside the targets. Exit status 1 if one is missed. With --keep the files are made in DIR
and used again."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.measure import plan  # noqa: E402
from tests.support import opt175b  # noqa: E402

MAX_SECONDS, MAX_BYTES = 30, 1_000_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--to", default="alpa", help="the framework to plan for (default: %(default)s)"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="where to keep the made files (default: nowhere)"
    )
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = (args.keep or Path(scratch)) / "opt175b"
        if len(list(source.glob("*.pt"))) < opt175b.PARTS * opt175b.SHARDS:
            started = time.monotonic()
            source.mkdir(parents=True, exist_ok=True)
            opt175b.write(source)
            print(f"made in {time.monotonic() - started:.0f} s", file=sys.stderr)
        return (
            0 if plan("OPT-175B", source, ["--to", args.to, *flags], MAX_SECONDS, MAX_BYTES) else 1
        )


if __name__ == "__main__":
    sys.exit(main())
