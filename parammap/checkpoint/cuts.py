"""How a tensor is cut over tensor-parallel ranks: what its family's table and what its run recorded
say, as one answer.

The down-projections of multi-latent attention are cut by some releases and kept whole on every rank
by others, so that no table can tell; their rule stands here too. Sources: Megatron-LM core_v0.10.0
… core_v0.19.0 (core/tensor_parallel/layers.py, core/extensions/transformer_engine.py,
core/models/gpt/gpt_layer_specs.py, core/transformer/multi_latent_attention.py)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from parammap.families import Row
from parammap.tensors.arrangement import (
    EXPERTS_FC1,
    GROUPED,
    KV_DOWN,
    Q_DOWN,
    REPLICATED,
    SHARD_0,
    SHARD_1,
    Sizes,
)

#: the dimension that tensor parallel cuts, by arrangement; 0 for the others
_DIMS: dict[str | None, int] = {REPLICATED: -1, SHARD_1: 1, EXPERTS_FC1: 1}
#: the arrangement of a tensor of which nothing is fused, by the dimension that is cut
_PLAIN: dict[int | None, str] = {-1: REPLICATED, 0: SHARD_0, 1: SHARD_1}
#: weights of several parts, each cut over ranks, which the attributes do not say: Mamba's and gated
#: delta nets' input projections and convolutions, and gated MLPs of Transformer Engine and of
#: legacy models
_OF_PARTS = re.compile(r"\b(?:in_proj|conv1d|linear_fc1|dense_h_to_4h)\.(?:weight|bias)$")


@dataclass(frozen=True, slots=True)
class Partition:
    """What a run recorded of a parameter: Megatron's attributes partition_dim (-1: none),
    partition_stride and tensor_model_parallel, and whether its gradients are those of experts.
    None: not recorded."""

    dim: int | None = None
    stride: int = 1
    tensor_parallel: bool | None = None
    expert: bool = False

    @property
    def cut(self) -> int | None:
        """The dimension that is cut, -1 for none; None where that is not recorded, or the
        attributes contradict each other. A weight that ranks duplicate is marked as not tensor
        parallel, and has a dimension all the same."""
        if self.dim is None or (self.dim < 0 and self.tensor_parallel):
            return None
        return -1 if self.dim < 0 or self.tensor_parallel is False else self.dim


#: nothing was recorded
UNRECORDED = Partition()


def dim_of(kind: str | None) -> int:
    """The dimension that tensor parallel cuts of a tensor so arranged, -1 for none: Megatron's
    partition_dim."""
    return _DIMS.get(kind, 0)


def kind_of(
    name: str, row: Row | None, said: Partition, shape: tuple[int, ...], tp: int, sizes: Sizes
) -> str | None:
    """How the tensor `name`, of which a rank holds `shape`, is arranged and cut; None where nobody
    knows, or where table and recorded facts contradict each other.

    A tensor is whole on every rank where either says so, unless it is a fused one: while it is
    copied, all ranks' copies are compared. Of experts the table alone tells: up to core 0.16
    Megatron marks those of Transformer Engine as cut along dim 0, whatever they are."""
    if row is None:
        is_plain = said.cut == -1 or not (said.stride != 1 or _OF_PARTS.search(name))
        return _PLAIN.get(said.cut) if is_plain and not said.expert else None
    if row.arrangement in (Q_DOWN, KV_DOWN):
        return _down_projection(row.arrangement, said, shape, tp, sizes)
    of_experts = said.expert or row.arrangement in GROUPED or "{e}" in row.canonical
    if (
        of_experts
        or row.arrangement == REPLICATED
        or said.dim is None
        or said.cut == dim_of(row.arrangement)
    ):
        return row.arrangement
    return REPLICATED if said.cut == -1 and row.arrangement in (SHARD_0, SHARD_1) else None


def _down_projection(
    arrangement: str, said: Partition, shape: tuple[int, ...], tp: int, sizes: Sizes
) -> str | None:
    """Of q or kv in multi-latent attention: as the run marked it (core 0.17 and later), else as its
    release does it, else as the rows of a rank's share tell."""
    if said.cut == -1 or sizes.whole_downs:
        return REPLICATED
    if sizes.whole_downs is not None:
        return SHARD_0
    whole = sizes.q_down if arrangement == Q_DOWN else sizes.kv_down
    if tp == 1 or whole is None:
        return arrangement if tp == 1 else None
    return REPLICATED if shape[0] == whole else SHARD_0
