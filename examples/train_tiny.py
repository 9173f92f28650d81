"""Trains a tiny GPT with the real megatron-core on a CPU, and saves it with sidecars and with the
live state beside it.

  python examples/train_tiny.py --core 0.16.1 --out DIR --tp 2 --pp 2

writes DIR/iter_*/ as Megatron-LM does, DIR/latest_checkpointed_iteration.txt, and DIR/truth/ (see
tiny/live_state.py)."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples import cpu_shim
from examples.cpu_shim import transformer_engine
from examples.fetch_core import fetch_core
from examples.tiny import options as choices


def main() -> None:
    options = choices.parser().parse_args()
    options.out = options.out.resolve()
    if options.resume and not options.resume.is_dir():
        raise SystemExit(f"--resume {options.resume}: no such folder")
    if options.out.exists() and any(options.out.iterdir()):
        raise SystemExit(f"{options.out} is not empty; remove it or choose another --out")
    core = Path(options.core) if os.path.isdir(options.core) else fetch_core(options.core)
    sys.path.insert(0, str(core))
    cpu_shim.install(transformer_engine=needs_transformer_engine(core))
    if options.transformer_impl == "transformer_engine":
        transformer_engine.install(options.extra_state)
    cpu_shim.patch_megatron()
    options.out.mkdir(parents=True, exist_ok=True)

    import torch.multiprocessing

    from examples.tiny.train import run_rank

    with (
        tempfile.TemporaryDirectory() as scratch
    ):  # forked, so that torch and megatron are imported once
        torch.multiprocessing.start_processes(
            run_rank,
            (options, Path(scratch) / "store"),
            choices.world_size(options),
            start_method="fork",
        )


def needs_transformer_engine(core: Path) -> bool:
    """megatron-core up to 0.7 imports it always."""
    release = runpy.run_path(str(core / "megatron/core/package_info.py"))
    return (release["MAJOR"], release["MINOR"]) < (0, 8)


if __name__ == "__main__":
    main()
