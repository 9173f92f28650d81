"""What makes a conversion this very one: its whole plan, the files it reads as they are now, its
options, and the program.

Two runs of equal fingerprints write equal bytes, so that one may go on where the other ended, or
need not run at all."""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from parammap.job.source_files import stamp_of
from parammap.plan.plan import FileTask, Plan
from parammap.tensors.logical import LogicalTensor
from parammap.tensors.region import Region
from parammap.tensors.view import View

_PACKAGE = Path(__file__).parents[1]
#: the format of marshal that writes equal bytes for equal values: later ones refer back to objects
#: seen before
_MARSHAL = 2
_ATOMS = (str, int, bool, bytes, float, type(None))


def fingerprint(plan: Plan, options: Iterable[object] = ()) -> str:
    """A hash in hexadecimal; `options` are those that shape the output beside the plan."""
    digest = hashlib.sha256(program().encode())
    digest.update(repr(list(options)).encode())
    for name in sorted(plan.sources()):
        digest.update(marshal.dumps((name, stamp_of(name)), _MARSHAL))
    known: dict[int, object] = {}
    fields_of = attrgetter(*(one.name for one in fields(FileTask)))
    for task in plan.tasks:
        for one in fields_of(task):
            digest.update(marshal.dumps([_plain(part, known) for part in one], _MARSHAL))
    return digest.hexdigest()


@cache
def program() -> str:
    """A hash, in hexadecimal, of the package's own files: its source and its data."""
    digest = hashlib.sha256()
    for path in sorted(
        path for path in _PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ):
        digest.update(
            f"{path.relative_to(_PACKAGE)} {path.stat().st_size}\n".encode() + path.read_bytes()
        )
    return digest.hexdigest()


def _plain(value: Any, known: dict[int, object]) -> object:
    """A value of tuples and of what marshal knows. `known` has the logical tensors, which many
    others share and which live as long as the plan does, by identity."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is tuple:
        return tuple([_plain(one, known) for one in value])
    if kind in (View, Region):
        return tuple(value)
    if not is_dataclass(kind):
        raise TypeError(f"a {kind.__name__} has no place in a plan")
    if _is_flat(kind):
        return _getter(kind)(value)
    plain = known.get(id(value))
    if plain is None:
        plain = kind.__name__, *[_plain(one, known) for one in _getter(kind)(value)]
        if kind is LogicalTensor:
            known[id(value)] = plain
    return plain


@cache
def _getter(kind: type) -> Callable[[object], tuple[Any, ...]]:
    names = [one.name for one in fields(kind)]
    return attrgetter(*names) if len(names) > 1 else lambda value: (getattr(value, names[0]),)


@cache
def _is_flat(kind: type) -> bool:
    """Whether all its fields are numbers and texts."""
    return all(one.type in ("int", "str") for one in fields(kind))
