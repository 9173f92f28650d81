"""A checkpoint as any framework's reader gives it: what is where, and the metadata that is no
tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from parammap.checkpoint.architecture import Architecture
from parammap.checkpoint.index import Index
from parammap.checkpoint.sidecar import Sidecar
from parammap.errors import RefusedError
from parammap.tensors.layout import Layout

#: (tp, pp, ep) of a rank that has files of its own
Coordinates = tuple[int, int, int]


def _undescribed(checkpoint: Checkpoint) -> Architecture:
    raise RefusedError(
        f"{checkpoint.folder}: what its model computes is not known; read it with registry.read"
    )


@dataclass(slots=True)
class Checkpoint:
    """Read from headers and sidecars alone; no tensor data.

    `metas` holds per rank what Megatron-LM keeps beside the model: args, iteration,
    checkpoint_version, optimizer (its parameter groups), opt_param_scheduler, rng_state …
    `structures` holds per rank and chunk the state dict's own shape: nested dicts with a TensorSpec
    for each tensor and everything else as it was saved. `trained` is the run's own layout where the
    checkpoint is presented in another one; `notes` say what a user should know of it.
    `describe` is its framework's way to tell what the model computes (see
    frameworks/architecture.py)."""

    framework: str
    folder: Path
    iteration: int
    layout: Layout
    index: Index
    with_optimizer: bool
    num_layers: int
    rank_folders: dict[Coordinates, Path]
    rank_metadata: dict[Coordinates, dict]
    structures: dict[Coordinates, list[dict]] = field(default_factory=dict)
    sidecar: Sidecar | None = None
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trained: Layout | None = None
    describe: Callable[[Checkpoint], Architecture] = _undescribed

    def stage_layers(self) -> list[int]:
        """The number of layers of each pipeline stage."""
        layers: dict[int, set[int]] = {pp: set() for pp in range(self.layout.pp)}
        for held in self.index.held:
            if held.layer is not None:
                layers[held.found.place.pp].add(held.layer)
        return [len(numbers) for numbers in layers.values()]
