"""What the tests of test_torch_dist_target share with others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from examples.tiny.options import command_line
from examples.tiny.trained import ROOT


def resume(checkpoint: Path, out: Path, **options) -> Path:
    """Megatron-core 0.16.1 loads the checkpoint in the layout of `options`, and saves in torch
    format without a step."""
    words = command_line({"core": "0.16.1", "plain": True, **options})
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            str(ROOT / "examples/train_tiny.py"),
            "--out",
            str(out),
            "--resume",
            str(checkpoint),
            *words,
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return out


def assert_same_arrays(truth: Path, resumed: Path) -> None:
    files = sorted(truth.glob("tp*.npz"))
    assert (
        [file.name for file in files]
        == [file.name for file in sorted(resumed.glob("tp*.npz"))]
        != []
    )
    for file in files:
        live, loaded = np.load(file), np.load(resumed / file.name)
        assert set(live) == set(loaded)
        assert [
            key for key in live if key != "meta" and live[key].tobytes() != loaded[key].tobytes()
        ] == []
