"""Two checkpoints of any framework and layout, compared as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.frameworks import registry
from parammap.proof.compare import (
    Difference,
    Pair,
    Tolerance,
    differences,
    pair,
)
from parammap.proof.training_state import training_state_differences
from parammap.tensors.logical import LogicalTensor


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two checkpoints have in common and what not.

    `compared` are the tensors of both and `differences` what differs of them; `metadata` says what
    iteration, parameter groups and scheduler differ in, `wrong_shapes` which of the two contradicts
    its own arguments. Not compared are `aside` copies of weights, which the model computes with and
    one checkpoint alone keeps, and `padding` of vocabularies of other numbers of rows."""

    a: Path
    b: Path
    compared: list[Pair]
    differences: list[Difference]
    only_in_a: list[LogicalTensor]
    only_in_b: list[LogicalTensor]
    metadata: list[str]
    wrong_shapes: list[str]
    aside: int
    padding: list[LogicalTensor]

    @property
    def is_equal(self) -> bool:
        return not (
            self.differences
            or self.only_in_a
            or self.only_in_b
            or self.metadata
            or self.wrong_shapes
        )

    @property
    def elements(self) -> int:
        """How many elements were compared."""
        return sum(one.elements for one in self.compared)


def diff(
    a: Checkpoint,
    b: Checkpoint,
    rtol: float | None = None,
    atol: float | None = None,
    workers: int = 1,
) -> Comparison:
    """Compare two checkpoints: bit by bit, or, with a tolerance, by value.

    Raises RefusedError if they have no element in common, or a tolerance is negative."""
    if min(rtol or 0.0, atol or 0.0) < 0:
        raise RefusedError("--rtol, --atol: a tolerance is not negative")
    is_exact = rtol is None and atol is None
    tolerance = None if is_exact else Tolerance(rtol or 0.0, atol or 0.0)
    pairing = pair(a, b)
    return Comparison(
        a.folder,
        b.folder,
        pairing.pairs,
        differences(a.index, b.index, pairing.pairs, tolerance, workers),
        pairing.only_a,
        pairing.only_b,
        training_state_differences(a, b),
        [
            f"{one.folder}: {names}: {what}"
            for one in (a, b)
            for names, what in registry.framework(one.framework).contradictions(one).items()
        ],
        pairing.aside,
        pairing.padding,
    )
