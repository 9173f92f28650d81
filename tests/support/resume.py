"""What the tests of test_resume share with others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch


def with_zeroed_moments(checkpoint: Path, out: Path) -> Path:
    """A copy whose exp_avg and exp_avg_sq are zero, by torch alone."""
    shutil.copytree(checkpoint, out)
    for file in out.glob("iter_*/*/distrib_optim.pt"):
        saved = torch.load(file, weights_only=True)
        for tensor in moments(saved):
            tensor.zero_()
        torch.save(saved, file)
    return out


def moments(tree: Any, key: Any = None) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree] if key in ("exp_avg", "exp_avg_sq") else []
    if isinstance(tree, dict):
        return [tensor for name, value in tree.items() for tensor in moments(value, name)]
    return (
        [tensor for value in tree for tensor in moments(value, key)]
        if isinstance(tree, list)
        else []
    )
