# SPDX-License-Identifier: Apache-2.0

"""What the save-time hooks of all frameworks share: never harm a save, never leave half a file.

Needs the standard library and torch only, Python 3.8 and later.
The ParamMap project maintains this file, in hooks/; its patches add it to each framework.
"""

import functools
import json
import logging
import math
import os
import threading
from argparse import Namespace
from collections.abc import Mapping
from enum import Enum
from typing import Any, Callable, Dict, List, Set

import torch

SWITCH = "SAVE_PARAM_MAP"  # environment variable; 0 turns the hooks off

logger = logging.getLogger(__name__)
_warned: Set[str] = set()


class NoSidecar(Exception):
    """This save is of a kind that the sidecar does not describe; the message says why."""


def harmless(save: Callable[..., None]) -> Callable[..., None]:
    """Decorate a hook: whatever happens in it becomes one warning, and training goes on.

    The hook is called unless the environment says SAVE_PARAM_MAP=0. It may raise NoSidecar, which
    global rank 0 alone reports; any other error is reported by the rank that it happened on.
    """

    @functools.wraps(save)
    def guarded(*args: Any, **kwargs: Any) -> None:
        if os.environ.get(SWITCH) == "0":
            return
        try:
            save(*args, **kwargs)
        except NoSidecar as reason:
            if global_rank() == 0:
                warn_once(f"no sidecar for this checkpoint: {reason}")
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            warn_once(f"rank {global_rank()} wrote no sidecar, training goes on: {what}")

    return guarded


def warn_once(message: str) -> None:
    """Log a warning that this process has not logged yet."""
    if message not in _warned:
        _warned.add(message)
        logger.warning("param_map: %s", message)


def global_rank() -> int:
    """Rank of this process; 0 where torch.distributed is not in use."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def dtype_name(dtype: torch.dtype) -> str:
    """'bfloat16' for torch.bfloat16."""
    return str(dtype).replace("torch.", "")


def to_json(value: Any) -> bytes:
    """Encode what to_plain() gives; raises ValueError for a float that JSON does not have."""
    return json.dumps(value, allow_nan=False).encode()


def to_plain(value: Any) -> Any:
    """The value as JSON can hold it: enums and dtypes by name, what JSON lacks as its string."""
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, Namespace):
        return to_plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return str(value)


def write_files(folder: str, files: Dict[str, bytes]) -> List[str]:
    """Write the files, by name, in their order, each whole or not at all.

    Returns what sync_in_background() has to force to the disk: the files and the folder.
    """
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, name) for name in files]
    for path, content in zip(paths, files.values()):
        write_atomically(path, content)
    return [*paths, folder]


def write_atomically(path: str, content: bytes) -> None:
    """Write a file that a reader sees whole or not at all, also if this fails."""
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            file.write(content)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)


def sync_in_background(paths: List[str]) -> None:
    """Force files and folders to the disk while training goes on.

    Not at once: amid a save, fsync can wait for tenths of a second.
    """

    def sync() -> None:
        for path in paths:
            try:
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            except OSError as error:
                warn_once(f"rank {global_rank()} could not sync {path}: {error}")

    threading.Thread(target=sync, name="param_map sync").start()
