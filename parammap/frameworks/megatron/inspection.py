"""What `parammap inspect` tells of a Megatron-LM checkpoint whose optimizer cannot be read."""

from __future__ import annotations

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.frameworks.framework import Unreadable
from parammap.frameworks.megatron.files import OPTIMIZER_FILE
from parammap.frameworks.megatron.reader import find_sidecar


def unreadable(weights: Checkpoint, error: RefusedError) -> Unreadable:
    """Why the optimizer's states cannot be read: because no rank has any, because there is no
    sidecar, or because a bare map does not tell the experts' buckets. Raises the error if it is of
    another kind: damage."""
    there = [(path / OPTIMIZER_FILE).is_file() for path in weights.rank_folders.values()]
    if not any(there):
        return f"no rank has a {OPTIMIZER_FILE}: saved without its optimizer", frozenset()
    if not all(there):
        raise error
    try:
        is_bare = not find_sidecar(weights.folder, weights.iteration, None).complete
    except RefusedError as no_sidecar:
        return str(no_sidecar), frozenset()
    if not is_bare:
        raise error
    return str(error), frozenset({"experts"})
