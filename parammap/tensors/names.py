"""Tensor names in one line of an error: in long lists, names that differ only in numbers stand
together."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_NUMBER = re.compile(r"\d+")
_SHOWN = 12


def shorten_names(names: Iterable[str]) -> str:
    """`a.0.w, a.1.w, b` → `a.{0-1}.w, b`."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        groups.setdefault(_NUMBER.sub("{}", name), []).append(
            tuple(map(int, _NUMBER.findall(name)))
        )
    shown = [
        pattern.format(*(_span(column) for column in zip(*numbers, strict=True)))
        for pattern, numbers in sorted(groups.items())
    ]
    return ", ".join(shown[:_SHOWN]) + (
        f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    )


def suggest(name: str, known: Iterable[str]) -> str:
    """What an error says after a name that is not there: the names closest to it, if any are."""
    near = difflib.get_close_matches(name, list(known), 3)
    return f"; perhaps {' or '.join(near)}?" if near else ""


def _span(numbers: Iterable[int]) -> str:
    numbers = sorted(set(numbers))
    if len(numbers) == 1:
        return str(numbers[0])
    contiguous = numbers[-1] - numbers[0] == len(numbers) - 1
    inside = f"{numbers[0]}-{numbers[-1]}" if contiguous else ",".join(map(str, numbers))
    return f"{{{inside}}}"
