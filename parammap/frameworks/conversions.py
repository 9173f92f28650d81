"""Which framework's checkpoints can be written for which other one, for each family of models.

The table is made of what the registered frameworks read and write; tests convert along every pair
of it."""

from __future__ import annotations

from collections.abc import Iterator

from parammap.families import FAMILIES
from parammap.frameworks import registry

#: what goes along: the optimizer's states as well, or the weights alone
WHOLE, WEIGHTS = "whole state", "weights"


def goes(family: str, source: str, to: str) -> str | None:
    """What of a model of a family goes from one framework to another: WHOLE, WEIGHTS, or None for
    nothing."""
    framework, target = registry.framework(source), registry.target(to)
    if family not in framework.families() or to not in targets(family):
        return None
    is_native = source in target.native
    if (
        target.needs_optimizer
        and not framework.optimizer
        or (target.native and not is_native and not target.import_model)
    ):
        return None
    return WHOLE if framework.optimizer and target.optimizer else WEIGHTS


def pairs() -> Iterator[tuple[str, str, str]]:
    """(family, source, target) of all that works."""
    return (
        (family, source, to)
        for family in FAMILIES
        for source in sources(family)
        for to in targets(family)
        if goes(family, source, to)
    )


def sources(family: str) -> list[str]:
    """The frameworks whose checkpoints of a family are read."""
    return [one.name for one in registry.frameworks() if family in one.families()]


def targets(family: str) -> list[str]:
    """What models of a family are written for."""
    return sorted(
        target.name
        for framework in registry.frameworks()
        for target in framework.targets
        if family in (target.families or framework.families)()
    )


def tables() -> str:
    """A table in Markdown for each family: sources down, targets across."""
    return "\n\n".join(f"### {one.title}\n\n{_table(name)}" for name, one in FAMILIES.items())


def _table(family: str) -> str:
    names = targets(family)
    rows = [
        ["from \\ to", *names],
        ["---"] * (len(names) + 1),
        *([one, *(goes(family, one, to) or "–" for to in names)] for one in sources(family)),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
