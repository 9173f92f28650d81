"""What the house knows of a file format: one record, which the format's own module makes and
registry.py lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parammap.formats.frames import Frame, Segment
from parammap.tensors.logical import Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Files of the format end in one of `suffixes`; those that begin with `magic` are known by it
    under another ending, too.

    `entries` reads a file's headers: where the bytes of each tensor lie, or a text, by the key that
    the format's own loader knows it by. It raises RefusedError for a file that is missing, damaged
    or of another format. `structure` says what lies at a byte of a file that belongs to no
    tensor."""

    name: str
    suffixes: tuple[str, ...]
    entries: Callable[[Path], Mapping[str, Stored | str]]
    structure: Callable[[Path, int], str]
    magic: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatFormat(Format):
    """A format of tensors by their names. `frame` gives the segments of a file that holds tensors;
    by keyword it takes what only this format has."""

    frame: Callable[..., list[Segment]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeFormat(Format):
    """A format of Python objects, with tensors anywhere in them. `read_tree` gives the object with
    a Stored in place of each tensor, and `frame_tree` the file of that name from which the format's
    loader gives the object, whose tensors are TensorSpec or Stored."""

    read_tree: Callable[[Path], Any]
    frame_tree: Callable[[Any, str], Frame]


def subscripts(tree: object, path: str = "") -> Iterator[tuple[str, Stored]]:
    """The tensors of a Python object, by the subscription that leads to each: `['model'][…]`."""
    if isinstance(tree, Stored):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from subscripts(value, f"{path}[{_key(key)}]")
    elif isinstance(tree, (list, tuple)):
        for number, value in enumerate(tree):
            yield from subscripts(value, f"{path}[{number}]")


def _key(key: object) -> str:
    if isinstance(key, tuple):
        return f"({', '.join(map(_key, key))})"
    return repr(key) if isinstance(key, (str, int)) else str(key)
