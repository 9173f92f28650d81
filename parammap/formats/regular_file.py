"""Opening what is read: regular files only. Reading anything else, such as a pipe or /dev/zero, may
wait for ever or never end."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from parammap.errors import RefusedError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to read. Raises RefusedError if it cannot be opened, is no regular file, or cannot be
    read inside of the context."""
    with _refusing(path), open(descriptor_of(path), "rb") as stream:
        yield stream


def descriptor_of(path: str | os.PathLike[str]) -> int:
    """An open descriptor of a file to read. Raises RefusedError as `opened` does."""
    with _refusing(path):
        # a named pipe that nobody writes to would wait in open
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind == stat.S_IFREG:
        return descriptor
    os.close(descriptor)
    raise RefusedError(
        f"{os.fsdecode(path)}: is {_KINDS.get(kind, 'special')} and no regular file; put the file "
        "itself there"
    )


@contextmanager
def _refusing(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RefusedError(
            f"{os.fsdecode(path)}: cannot be read ({error.strerror or error}); check the path"
        ) from error
