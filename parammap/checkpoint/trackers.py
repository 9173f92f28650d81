"""Trackers: the small text files beside a save's iterations that name the latest one."""

from __future__ import annotations

import re
from pathlib import Path

from parammap.errors import RefusedError
from parammap.formats import regular_file

#: the folder of a checkpoint without an iteration, and what the tracker then says
RELEASE = "release"
#: a name in a file system has 255 bytes at most
_MAX_NBYTES = 256
#: as many digits as the largest iteration of 64 bits has
_ITERATION = re.compile(r"[0-9]{1,19}")


def read(tracker: Path) -> str:
    """The name that a tracker holds. Raises RefusedError for what is no name of a folder beside
    it."""
    with regular_file.opened(tracker) as stream:
        content = stream.read(_MAX_NBYTES + 1)
    name = content.decode(errors="replace").strip()
    if len(content) > _MAX_NBYTES or not name.isprintable() or "/" in name or name in ("", ".."):
        raise _refusal(tracker, name)
    return name


def iteration_folder(tracker: Path) -> str:
    """The folder of the iteration that a tracker of Megatron-LM's form names: `release`, or
    `iter_` and seven digits. Raises RefusedError for what is no iteration."""
    name = read(tracker)
    if name != RELEASE and not _ITERATION.fullmatch(name):
        raise _refusal(tracker, name)
    return name if name == RELEASE else f"iter_{int(name):07d}"


def _refusal(tracker: Path, name: str) -> RefusedError:
    return RefusedError(
        f"{tracker}: holds {name[:20]!r} and not an iteration; choose one with --iteration"
    )
