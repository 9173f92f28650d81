"""What a checkpoint's model computes, asked of the framework that it is of, and whether another one
computes that."""

from __future__ import annotations

from dataclasses import replace

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.families import Architecture


def check_family(source: Checkpoint, family: str, wanted: tuple[str, ...], target: str) -> None:
    """Refuse a model of a family that the target framework has no implementation of."""
    if family not in wanted:
        raise RefusedError(
            f"{source.folder}: is a model of the {family} family, and {target} has "
            f"{', '.join(wanted)} only; the two have no architecture in common "
            "(`parammap formats` lists what goes where)"
        )


def architecture_of(checkpoint: Checkpoint, activation: str | None = None) -> Architecture:
    """What a checkpoint's model computes; `activation` is the user's word for one that records
    none.

    Raises RefusedError for a model that has no architecture in common with another framework's, and
    where the user's word and the record differ."""
    known = checkpoint.describe(checkpoint)
    if activation and known.activation not in (None, activation):
        raise RefusedError(
            f"{checkpoint.folder}: its activation is {known.activation} and not {activation}; "
            "leave --activation out"
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
            "only transformers itself has such a model"
        )
    return known
