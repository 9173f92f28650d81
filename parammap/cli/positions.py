"""Elements that differ, as JSON has them."""

from __future__ import annotations

from typing import TypedDict

from parammap.proof.compare import Difference


class Position(TypedDict):
    row: int
    column: int
    a: float
    b: float
    file_a: str
    offset_a: int
    file_b: str
    offset_b: int


def positions(found: Difference) -> list[Position]:
    """The elements that a difference lists, in order."""
    return [
        {
            "row": at.row,
            "column": at.column,
            "a": at.a,
            "b": at.b,
            "file_a": at.place_a[0],
            "offset_a": at.place_a[1],
            "file_b": at.place_b[0],
            "offset_b": at.place_b[1],
        }
        for at in found.positions
    ]
