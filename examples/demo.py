"""The whole way once: train a tiny Megatron model, convert it, prove that MindSpore loads the same
state.

  python examples/demo.py OUT [flags of `parammap convert`]

OUT/megatron is the checkpoint (kept if it is there already), OUT/megatron/truth the live state,
OUT/mindspore the result. Exit status 0 only if every array that mindspore.load_checkpoint loads
equals the live state, bit for bit."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.mindspore_proof import add_layout, layout_flags
from examples.tiny.trained import ROOT, train_into

#: 8 heads and 8 layers, so that this checkpoint can be laid out for up to tp 8 and pp 8
RUN: dict[str, Any] = {"core": "0.16.1", "tp": 2, "pp": 2, "dp": 2, "heads": 8, "layers": 8}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    add_layout(parser)
    args, flags = parser.parse_known_args()
    out, layout = args.out.resolve(), layout_flags(args)

    began = time.perf_counter()
    print(
        "1. training with megatron-core {core}, tp{tp} pp{pp} dp{dp}, on the CPU".format(**RUN),
        flush=True,
    )
    run = train_into(out / "megatron", RUN)
    print(f"   {run.path} ({time.perf_counter() - began:.1f} s)", flush=True)

    print(f"2. converting to MindSpore {' '.join(layout)}", flush=True)
    converted = out / "mindspore"
    status = python(
        "parammap",
        "convert",
        run.path,
        converted,
        "--to",
        "mindspore",
        "--overwrite",
        *layout,
        *flags,
    )
    if status:
        return status

    print(
        "3. loading every rank with mindspore.load_checkpoint, and comparing with the live state",
        flush=True,
    )
    status = python("examples.mindspore_proof", run.path, converted, *layout)
    print(f"   all of it in {time.perf_counter() - began:.1f} s")
    return status


def python(module: str, *arguments: Any) -> int:
    """Run a module in a process of its own, where this repository is; returns its exit status."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)], cwd=ROOT
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
