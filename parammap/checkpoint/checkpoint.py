"""A checkpoint as any framework's reader gives it: what is where, and the metadata that is no
tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parammap.checkpoint.index import Index
from parammap.checkpoint.sidecar import Sidecar
from parammap.checkpoint.training_state import Number, TrainingState, together
from parammap.errors import RefusedError
from parammap.families import Architecture
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

    `rank_metadata` is what each rank's file holds beside the model and the optimizer's tensors, in
    its framework's own form, which only that framework's code knows; `training_states` is what
    other frameworks can take of it. `structures` holds per rank and chunk the state dict's own
    shape: nested dicts with a TensorSpec for each tensor and everything else as it was saved.
    `trained` is the run's own layout where the checkpoint is presented in another one; `notes` say
    what a user should know of it. `describe` is its framework's way to tell what the model computes
    (see frameworks/architecture.py)."""

    framework: str
    folder: Path
    iteration: int
    layout: Layout
    index: Index
    with_optimizer: bool
    num_layers: int
    rank_folders: dict[Coordinates, Path]
    rank_metadata: dict[Coordinates, dict[str, Any]]
    structures: dict[Coordinates, list[dict[str, Any]]] = field(default_factory=dict)
    sidecar: Sidecar | None = None
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trained: Layout | None = None
    training_states: dict[Coordinates, TrainingState] = field(default_factory=dict)
    describe: Callable[[Checkpoint], Architecture] = _undescribed

    @property
    def common_metadata(self) -> dict[str, Any]:
        """The first rank's metadata, for what is the same in that of every rank; {} where there is
        none."""
        return next(iter(self.rank_metadata.values()), {})

    @property
    def training_state(self) -> TrainingState:
        """What its ranks say together of the run."""
        return together(self.training_states.values())

    def steps_taken(self) -> Number:
        """How many times the optimizer has stepped every parameter; the iteration where that is not
        recorded. Raises RefusedError where parameters differ."""
        steps = self.training_state.steps
        if len(steps) > 1:
            raise RefusedError(
                f"{self.folder}: parameters have taken different numbers of steps {list(steps)}, "
                "and the target counts them once for all"
            )
        return int(steps[0]) if steps else self.iteration

    def stage_layers(self) -> list[int]:
        """The number of layers of each pipeline stage."""
        layers: dict[int, set[int]] = {pp: set() for pp in range(self.layout.pp)}
        for held in self.index.held:
            if held.layer is not None:
                layers[held.found.place.pp].add(held.layer)
        return [len(numbers) for numbers in layers.values()]
