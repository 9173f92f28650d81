"""What a target must be: a place in which a new folder can appear, found out before a byte is
copied."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from parammap.checkpoint.manifest import Manifest, read_whole
from parammap.errors import RefusedError
from parammap.job.staging import has_content

#: where Linux lists what is mounted where (man 5 proc); the fifth field is the place
_MOUNTS = Path("/proc/self/mountinfo")


def check_target(target: Path, overwrite: bool, inputs: Iterable[Path], apart: bool) -> None:
    """Refuse a target that cannot be made or replaced, that holds an input, that has content that
    may not be replaced, or, where it has to lie `apart`, one inside of an input."""
    if target.name in ("", ".."):
        raise RefusedError(f"{target}: has no name of its own; name the folder to make")
    place = Path(os.path.realpath(target))
    for path in inputs:
        there = Path(os.path.realpath(path))
        if there.is_relative_to(place):
            raise RefusedError(
                f"{target}: holds {path}, which is read; choose another folder for the output"
            )
        if apart and place.is_relative_to(there):
            raise RefusedError(
                f"{target}: lies in {path}, which is read; choose a folder outside of it"
            )
    if target.is_symlink():
        raise RefusedError(f"{target}: is a symbolic link; name the folder itself")
    if target.exists() and not target.is_dir():
        raise RefusedError(f"{target}: is a file; name a folder for the output")
    if has_content(target) and not overwrite:
        raise RefusedError(
            f"{target}: is not empty; choose another folder, or replace it with --overwrite"
        )
    if _is_mounted(target):
        raise RefusedError(
            f"{target}: is a mount point, which cannot be replaced; name a folder in it"
        )
    check_writable(target)


def check_writable(target: Path) -> None:
    """Refuse a target in a place where nothing can be made."""
    parent = next(folder for folder in target.absolute().parents if os.path.lexists(folder))
    for folder in (parent, target) if has_content(target) else (parent,):
        if not folder.is_dir():
            raise RefusedError(f"{folder}: is no folder; choose another place for the output")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RefusedError(f"{folder}: cannot be written to; choose another place")
    owners = {os.stat(folder).st_uid for folder in (parent, target) if folder.is_dir()}
    is_sticky = os.stat(parent).st_mode & stat.S_ISVTX
    if target.is_dir() and is_sticky and not owners & {os.geteuid()} and os.geteuid():
        raise RefusedError(
            f"{target}: belongs to somebody else, who alone may replace it; choose another folder"
        )


def _is_mounted(target: Path) -> bool:
    """Whether a file system, or a part of one, is mounted at this very place."""
    if not _MOUNTS.is_file():
        return os.path.ismount(target)
    escaped = os.path.realpath(target).replace("\\", "\\134").replace(" ", "\\040")
    return any(
        line.split(" ")[4] == escaped
        for line in _MOUNTS.read_text(errors="surrogateescape").splitlines()
    )


def published(target: Path, fingerprint: str) -> Manifest | None:
    """The manifest of an output that this very conversion, or this part of one, has published
    before. Raises RefusedError for one that is damaged."""
    manifest = read_whole(target)
    return manifest if manifest and fingerprint in manifest.fingerprints else None
