"""What a transformers model computes, by its config.json."""

from __future__ import annotations

from ...architecture import Architecture
from ...checkpoint import Checkpoint
from .model import CONFIG, Model


def of(checkpoint: Checkpoint) -> Architecture:
    """The architecture, with the whole config.json of the checkpoint."""
    return Model(str(checkpoint.folder / CONFIG), next(iter(checkpoint.metas.values()))["config"]).architecture
