"""Grids of ranks, of which every cell must be there. What files and names say of their size may be
wrong, so nothing here is as large as the grid itself."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import TypeAlias

Cell: TypeAlias = tuple[int, ...]


def missing(there: Collection[Cell], sides: Sequence[Sequence[int]]) -> tuple[int, Cell] | None:
    """How many cells of the grid of these sides are not `there`, and the first of them; None if
    all are."""
    count = math.prod(map(len, sides)) - sum(_is_inside(cell, sides) for cell in there)
    return (count, next(cell for cell in cells(sides) if cell not in there)) if count else None


def extra(there: Collection[Cell], sides: Sequence[Sequence[int]]) -> Cell | None:
    """The first of the cells that are `there` and not of the grid."""
    return min((cell for cell in there if not _is_inside(cell, sides)), default=None)


def cells(sides: Sequence[Sequence[int]]) -> Iterator[Cell]:
    """All cells, the last side fastest, one by one."""
    if not sides:
        yield ()
        return
    for number in sides[0]:
        for rest in cells(sides[1:]):
            yield number, *rest


def _is_inside(cell: Cell, sides: Sequence[Sequence[int]]) -> bool:
    return all(number in side for number, side in zip(cell, sides, strict=True))
