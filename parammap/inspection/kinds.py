"""The kinds of parameters that an inspection tells apart: what a colour of the picture stands
for."""

from __future__ import annotations

#: kinds in the order in which they are shown
KINDS = ("embedding", "attention", "mlp", "experts", "norm", "other")
#: kinds by a part of a name, the first that fits
_PARTS = (
    ("norm", "norm"),
    ("expert", "experts"),
    ("router", "experts"),
    ("attention", "attention"),
    ("mlp", "mlp"),
    ("embedding", "embedding"),
    ("output_layer", "embedding"),
    ("output.", "embedding"),
    ("", "other"),
)


def kind_of(name: str) -> str:
    """The kind of a tensor, by its canonical name or by any framework's."""
    return next(kind for part, kind in _PARTS if part in name)
