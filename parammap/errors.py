"""The two ways a run can fail, the exit status each one gives, and what becomes of the system's own
errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class _OneLine(Exception):
    """Its message, in which what a file said cannot break the line or steer a terminal."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class RefusedError(_OneLine):
    """Input or flags are not usable; nothing was written. Exit status 2. The message is one line:
    file, fault, remedy."""


class TaskError(_OneLine):
    """A task failed while copying; nothing was published. Exit status 3. The message names file,
    tensor and reason."""


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an error of the system that names no file, such as one of write or fsync, name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextmanager
def told(kind: type[RefusedError | TaskError], path: str | os.PathLike[str]) -> Iterator[None]:
    """An error of the system as one of `kind` that names its file, or `path` if it names none."""
    try:
        yield
    except OSError as error:
        raise kind(said(error, path)) from error


def said(error: OSError, path: str | os.PathLike[str]) -> str:
    """The file and the fault of an error of the system; of two files, the one to be made."""
    file = error.filename2 or error.filename or path
    return f"{os.fsdecode(file)}: {error.strerror or error}"
