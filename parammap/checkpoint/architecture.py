"""What a model computes beyond what its tensors say: so that another framework can be told, or
refused where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError

#: GPT2: norms before attention and MLP, learned positions. OPT: the same with rows of padding
#: before the positions. LLAMA:
#: RMS norms, rotary positions, gate and up. BLOOM: ALiBi, a norm on the embedding
GPT2, OPT, LLAMA, BLOOM = "gpt2", "opt", "llama", "bloom"
#: families that only frameworks descended from Megatron-LM have
MIXTURE, YUAN = "mixture", "yuan"
#: rows of the table of positions before the first token's (metaseq,
#: learned_positional_embedding.py: padding_idx + 1)
ROWS_BEFORE_POSITIONS = {OPT: 2}


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
    rope_scaling: dict | None = None
    tied: bool | None = None
    bias: bool | None = None
    head_size: int | None = None
    config: dict = field(default_factory=dict)
    unlike: tuple[str, ...] = ()

    @property
    def rows_before_positions(self) -> int:
        return ROWS_BEFORE_POSITIONS.get(self.family, 0)


def check_family(source: Checkpoint, family: str, wanted: tuple[str, ...], target: str) -> None:
    """Refuse a model of a family that the target framework has no implementation of."""
    if family not in wanted:
        raise RefusedError(
            f"{source.folder}: is a model of the {family} family, and {target} has "
            f"{', '.join(wanted)} only; "
            "the two have no architecture in common (`parammap formats` lists what goes where)"
        )


#: by framework: what tells the architecture of one of its checkpoints; frameworks/registry.py fills
#: it
ARCHITECTURES: dict[str, Callable[[Checkpoint], Architecture]] = {}


def architecture_of(checkpoint: Checkpoint, activation: str | None = None) -> Architecture:
    """What a checkpoint's model computes; `activation` is the user's word for one that records
    none.

    Raises RefusedError for a model that has no architecture in common with another framework's, and
    where the user's word and the record differ."""
    known = ARCHITECTURES[checkpoint.framework](checkpoint)
    if activation and known.activation not in (None, activation):
        raise RefusedError(
            f"{checkpoint.folder}: its activation is {known.activation} and not {activation}; "
            f"leave "
            "--activation out"
        )
    return replace(known, activation=activation or known.activation)


def architecture_for(
    checkpoint: Checkpoint, families: tuple[str, ...], target: str, activation: str | None = None
) -> Architecture:
    """What a checkpoint's model computes, which the target framework, that has only those families,
    shall compute as well.

    Raises RefusedError for another family, and for settings that make the model compute otherwise
    than its family does."""
    known = architecture_of(checkpoint, activation)
    check_family(checkpoint, known.family, families, target)
    if known.unlike:
        raise RefusedError(
            f"{checkpoint.folder}: has {', '.join(known.unlike)}, which {target} does not compute; "
            f"only "
            "transformers itself has such a model"
        )
    return known
