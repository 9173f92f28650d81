"""Elements that differ, as JSON has them."""

from __future__ import annotations

from typing import Any

from parammap.proof.compare import Difference


def positions(found: Difference) -> list[dict[str, Any]]:
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
