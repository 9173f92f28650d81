"""Files and folders that survive a crash of the machine."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: str | Path) -> None:
    """Make a file or a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
