"""Writes the losses and gradient norms of a plain run to files that numpy alone can read.

truth/losses_dp{d:03}.npz is of one dp rank, from the last pipeline stage; micro-batches m of b samples of s tokens:
  steps     fp32 [steps, m]: the mean loss of each micro-batch, step by step
  norms     fp32 [steps]: the norm of all gradients before clipping, as the optimizer's step returns it
  tokens    int64 [m, b, s + 1]: a batch that no step has, the same in all runs: first s the input, last s the labels
  evaluated fp32 [m, b, s]: the loss of each of those labels, by the model as it was saved, in evaluation mode
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from megatron.core import parallel_state

#: of each micro-batch: the mean loss "lm", the "tokens", the loss of each label, "each"; empty but
#: on the last stage
Losses = list[dict[str, torch.Tensor]]


class Step(NamedTuple):
    """What a training step computed on this rank."""

    losses: Losses
    norm: float


def write(folder: Path, steps: list[Step], evaluated: Losses) -> None:
    """Write the file of this dp rank, if this rank is the one of it that computed losses."""
    first = (
        parallel_state.get_tensor_model_parallel_rank()
        == parallel_state.get_context_parallel_rank()
        == 0
    )
    if not evaluated or not first:
        return
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / f"losses_dp{parallel_state.get_data_parallel_rank():03}.npz",
        steps=np.array([[float(loss["lm"]) for loss in step.losses] for step in steps], np.float32),
        norms=np.array([step.norm for step in steps], np.float32),
        tokens=np.stack([loss["tokens"].numpy() for loss in evaluated]),
        evaluated=np.stack([loss["each"].float().numpy() for loss in evaluated]),
    )
