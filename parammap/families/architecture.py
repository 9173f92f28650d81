"""What a model computes beyond what its tensors say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from parammap.families.registry import FAMILIES


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder, in the terms of transformers' configurations. None: nobody recorded it.

    `vocab` is the true vocabulary's size; `groups` are the heads of keys and values; `activation`
    is transformers' name of it (gelu is the exact one, gelu_new the one with tanh); `eps` the
    norms' own; `bias` says whether the layers' linear maps have one; `config` is the whole
    config.json of a source that has one, so that it can be written again as it was; `unlike` are
    settings by which it computes otherwise than its family's models do in other frameworks."""

    family: str
    layers: int
    hidden: int
    heads: int | None
    groups: int | None = None
    ffn: int | None = None
    vocab: int | None = None
    positions: int | None = None
    activation: str | None = None
    eps: float | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    tied: bool | None = None
    bias: bool | None = None
    head_size: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    unlike: tuple[str, ...] = ()

    @property
    def rows_before_positions(self) -> int:
        return FAMILIES[self.family].rows_before_positions
