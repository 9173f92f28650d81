"""The file formats that the house knows, a line for each; and which of them a file is of."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from parammap.errors import RefusedError
from parammap.formats import mindspore_ckpt, npy, regular_file, safetensors, torch_legacy, torch_zip
from parammap.formats.format import Format

#: of several with one ending, the last one is that of files that begin with no other's magic bytes
_FORMATS: list[Format] = [
    mindspore_ckpt.FORMAT,
    safetensors.FORMAT,
    npy.FORMAT,
    torch_legacy.FORMAT,
    torch_zip.FORMAT,
]


def register(added: Format) -> None:
    """Add a format. Raises ValueError if its name is taken, or an ending without magic bytes that
    would tell whose a file is."""
    taken = [suffix for one in _FORMATS for suffix in one.suffixes if suffix in added.suffixes]
    if any(one.name == added.name for one in _FORMATS) or (taken and not added.magic):
        raise ValueError(f"{added.name} {' '.join(taken)}: there is another one already")
    _FORMATS.insert(0, added)


def unregister(name: str) -> None:
    """Remove a format that was registered."""
    _FORMATS[:] = [one for one in _FORMATS if one.name != name]


@cache
def _load_installed() -> None:
    """Register what installed packages add by entry points; the search for them takes a while."""
    for point in entry_points(group="parammap.formats"):
        register(point.load())


def find(file: Path) -> Format | None:
    """The format of a file, by its ending or its first bytes."""
    _load_installed()
    by_ending = [one for one in _FORMATS if file.suffix in one.suffixes]
    if len(by_ending) == 1:
        return by_ending[0]
    head = _head(file)
    by_magic = [one for one in by_ending or _FORMATS if one.magic and head.startswith(one.magic)]
    return next(iter(by_magic + by_ending[-1:]), None)


def suffixes() -> tuple[str, ...]:
    """The endings of all formats."""
    return tuple(dict.fromkeys(suffix for one in _FORMATS for suffix in one.suffixes))


def of(file: Path) -> Format:
    """The same. Raises RefusedError for a file of no format that is known."""
    found = find(file)
    if found is None:
        raise RefusedError(
            f"{file}: is no {', '.join(suffixes())} file, so nobody knows what lies where in it"
        )
    return found


def _head(file: Path) -> bytes:
    with regular_file.opened(file) as stream:
        return stream.read(max(len(one.magic) for one in _FORMATS))
