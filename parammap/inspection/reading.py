"""A checkpoint to be inspected, read as far as it can be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.frameworks import registry
from parammap.frameworks.framework import Inspection


@dataclass(frozen=True, slots=True)
class Reading:
    """What could be read: the model's weights, and the optimizer's states whole, without experts,
    or not at all (None).

    `reason` says why the states are not whole.
    """

    weights: Checkpoint
    states: Checkpoint | None
    reason: str | None = None

    @property
    def best(self) -> Checkpoint:
        return self.states or self.weights

    @property
    def whole(self) -> Checkpoint:
        """The one whose index names every tensor."""
        return self.weights if self.reason else self.best


def read(
    source: Path,
    *,
    iteration: int | None = None,
    sidecar: Path | None = None,
    metadata_from: Path | None = None,
) -> Reading:
    """Read as much as the sidecar allows. Raises RefusedError for what the reader refuses in the
    weights, in the optimizer's files, or between them and a sidecar that should suffice."""
    try:
        checkpoint = registry.read(
            source, iteration=iteration, sidecar=sidecar, metadata_from=metadata_from
        )
        return Reading(checkpoint, checkpoint if checkpoint.with_optimizer else None)
    except RefusedError as error:
        unreadable = registry.recognized(source).inspection.unreadable
        if sidecar or metadata_from or unreadable is None:
            raise
        weights = registry.read(source, iteration=iteration, weights_only=True)
        reason, drop = unreadable(weights, error)
        states = _without(drop, source, iteration) if drop else None
        return Reading(weights, states, reason)


def _without(drop: frozenset[str], source: Path, iteration: int | None) -> Checkpoint | None:
    try:
        return registry.read(source, iteration=iteration, drop=drop)
    except RefusedError:
        return None


def asked(checkpoint: Checkpoint) -> Inspection:
    """What the framework that a checkpoint is of has to say."""
    return registry.framework(checkpoint.framework).inspection
