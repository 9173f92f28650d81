"""How training goes on from what was converted: conversion by the command line, and the distances
between two runs.

docs/relayout.md says where the bounds come from.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from examples.tiny.trained import ROOT, Trained
from examples.tiny.whole import Sizes, whole

#: what summing in another order does to a loss near 5.6 and to a tensor, relative to its norm;
#: measured: 1e-6 and 9e-7 in fp32, 8e-3 and 7e-3 in bf16. The controls are beyond 2e-2 and 0.3.
LOSS = {"fp32": 5e-6, "bf16": 2e-2}
TENSOR = {"fp32": 5e-6, "bf16": 3e-2}
NORM = {"fp32": 5e-6, "bf16": 2e-2}


def convert(source: Path, out: Path, framework: str, sizes: Sizes | None, *flags: str) -> Path:
    """By the command line, which has to be content."""
    done = parammap(source, out, framework, sizes, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def parammap(
    source: Path, out: Path, framework: str, sizes: Sizes | None, *more: str
) -> subprocess.CompletedProcess[str]:
    """`sizes`: the layout of the output; None for a target that has none."""
    layout = sizes._asdict() if sizes else {}
    layout["stage_layers"] = ",".join(map(str, layout.get("stage_layers", ())))
    flags = [
        word
        for size, value in layout.items()
        if value
        for word in (f"--{size.replace('_', '-')}", str(value))
    ]
    command = [
        sys.executable,
        "-m",
        "parammap",
        "convert",
        str(source),
        str(out),
        "--to",
        framework,
        *flags,
        *more,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def losses(run: Trained, key: str, folder: str = "truth") -> np.ndarray:
    """Of all micro-batches of the step, or of each step, in the order in which the dp ranks take
    them."""
    files = sorted((run.path / folder).glob("losses_*.npz"))
    axis = 1 if key == "steps" else 0
    parts = np.stack([np.load(file)[key] for file in files], axis + 1)
    return parts.reshape(*parts.shape[:axis], -1, *parts.shape[axis + 2 :])


def distances(run: Trained, other: Trained, folder: str = "truth") -> dict[tuple[str, str], float]:
    """Of every tensor of the two models, relative to its norm; `folder`: which state of the
    other."""
    a, b = whole(run), whole(other, folder)
    assert set(a) == set(b) and len(a) > 50
    return {
        key: float(np.linalg.norm(a[key] - b[key]) / np.linalg.norm(b[key]))
        for key in a
        if key[0] != "weight"
    }
