"""What a checkpoint's file holds, whatever its format: its tensors by the key that its own loader
knows them by, and what lies between them."""

from __future__ import annotations

from pathlib import Path

from parammap.formats import registry
from parammap.tensors.logical import Stored


def entries_of(file: Path) -> list[tuple[str, Stored]]:
    """The tensors in a file, each with its key; in a file of torch.save that is the Python
    subscription, `['model'][…]`, and the one array of a numpy file has the file's name.

    Raises RefusedError if the file is of no format that can be read, or damaged.
    """
    entries = registry.of(file).entries(file)
    return [(key, entry) for key, entry in entries.items() if isinstance(entry, Stored)]


def structure_at(file: Path, offset: int) -> str:
    """What lies at a byte that belongs to no tensor."""
    found = registry.find(file)
    return found.structure(file, offset) if found else "no part of a tensor"
