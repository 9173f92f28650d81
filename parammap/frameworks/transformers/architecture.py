"""What a transformers model computes, by its config.json."""

from __future__ import annotations

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.families import Architecture
from parammap.frameworks.transformers.model import CONFIG, ModelConfig


def of(checkpoint: Checkpoint) -> Architecture:
    """The architecture, with the whole config.json of the checkpoint."""
    return ModelConfig(
        str(checkpoint.folder / CONFIG), checkpoint.common_metadata["config"]
    ).architecture
