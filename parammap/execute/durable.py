"""Files and folders that survive a crash of the machine."""

from __future__ import annotations

import os
from pathlib import Path

from parammap.errors import naming


def sync(path: str | Path) -> None:
    """Make a file or a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(path: str | Path, data: bytes) -> None:
    """Add to a file, or make it; not durable by itself."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        with naming(path):
            write(descriptor, data)
    finally:
        os.close(descriptor)


def write(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of it, of which the system may take a part at a time."""
    while data:
        data = data[os.write(descriptor, data) :]
