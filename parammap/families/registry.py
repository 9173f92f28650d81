"""The model families that are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import ParamSpec, TypeVar, cast

from parammap.families.bloom import BLOOM
from parammap.families.family import Family
from parammap.families.gpt2 import GPT2
from parammap.families.llama import LLAMA
from parammap.families.mixture import MIXTURE
from parammap.families.opt import OPT
from parammap.families.yuan import YUAN

#: by name, in the order in which tables and messages name them
FAMILIES: dict[str, Family] = {}

P = ParamSpec("P")
R = TypeVar("R")
_FORGET: list[Callable[[], None]] = []
#: names that are taken apart once: ranks, states and layouts repeat them
_NAMES = 1 << 16


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """Keep the results of a function until another family is registered."""
    known = lru_cache(maxsize=_NAMES)(function)
    _FORGET.append(known.cache_clear)
    return cast(Callable[P, R], known)


def register(family: Family) -> None:
    """Make a family known. Raises ValueError for one that is known, or whose table gives a name of
    a shared dialect another meaning than a known family does."""
    known = {*FAMILIES}
    for one in FAMILIES.values():
        known |= {*one.tables, *(one.config.types if one.config else ())}
    if taken := {family.name, *(family.config.types if family.config else ())} & known:
        raise ValueError(f"{', '.join(sorted(taken))}: is known already")
    for dialect, rows in family.tables.items():
        meanings = {
            name: row
            for one in FAMILIES.values()
            for row in one.tables.get(dialect, {}).values()
            for name in row.names
        }
        for row in rows.values():
            for name in row.names:
                if meanings.get(name, row) != row:
                    raise ValueError(
                        f"{family.name}: {name} is {row.canonical} ({row.arrangement}) here, and "
                        f"{meanings[name].canonical} ({meanings[name].arrangement}) in a known "
                        f"family of the dialect {dialect}"
                    )
    FAMILIES[family.name] = family
    _forget()


def unregister(name: str) -> None:
    """Make a family unknown again."""
    del FAMILIES[name]
    _forget()


@contextmanager
def registered(family: Family) -> Iterator[Family]:
    """A family that is known for the time of a `with` block."""
    register(family)
    try:
        yield family
    finally:
        unregister(family.name)


def with_dialect(*columns: str) -> tuple[str, ...]:
    """The names of the families whose tables have one of the columns."""
    return tuple(
        name for name, family in FAMILIES.items() if not set(columns).isdisjoint(family.dialects)
    )


def _forget() -> None:
    for clear in _FORGET:
        clear()


for _family in (GPT2, OPT, LLAMA, BLOOM, MIXTURE, YUAN):
    register(_family)
