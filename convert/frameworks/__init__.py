"""Frameworks: which folders and files a checkpoint of each consists of, and which rank writes what."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import Checkpoint
from . import megatron, mindspore_source

#: readers in the order in which they are asked whether a folder is theirs
READERS = {"mindspore": mindspore_source, "megatron": megatron}


def read(source: Path, *, iteration: int | None = None, sidecar: Path | None = None, weights_only: bool = False,
         drop: frozenset[str] = frozenset()) -> Checkpoint:
    """Read a checkpoint of whatever framework it is. Raises RefusedError if it is none, or damaged."""
    reader = next((reader for reader in READERS.values() if reader.recognizes(source)), megatron)
    return reader.read(source, iteration=iteration, sidecar_folder=sidecar, weights_only=weights_only, drop=drop)
