"""Reading a transformers folder: config.json says which tensors there are, and their files are held
to it.

The weights are of one rank and have no iteration, which counts as 0. A tied head that is stored all
the same is a copy of the word embedding; buffers that the model computes by itself, as old releases
saved them, are dropped."""

from __future__ import annotations

from pathlib import Path

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import Index, NameResolver, TensorEntry
from parammap.errors import RefusedError
from parammap.families import FAMILIES, HEAD, WORD_EMBEDDING, rows_of
from parammap.frameworks.framework import EVERYTHING, ReadOptions
from parammap.frameworks.transformers import files, model
from parammap.frameworks.transformers.files import Weights
from parammap.frameworks.transformers.model import ADAPTER, CONFIG, ModelConfig
from parammap.tensors.arrangement import Sizes
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import MAIN_PARAM, Stored
from parammap.tensors.names import shorten_names

DTYPES = ("float64", "float32", "float16", "bfloat16")


def recognizes(source: Path) -> bool:
    return source.is_dir() and (
        files.has_weights(source) or any((source / name).is_file() for name in (ADAPTER, CONFIG))
    )


def read(source: Path, options: ReadOptions = EVERYTHING) -> Checkpoint:
    """Read a folder's headers and its config.json.

    Raises RefusedError for an iteration asked for, for what cannot be converted (adapters,
    quantised models, other model types), and for tensors that are missing, unknown, misplaced, or
    not of the shapes that config.json asks for."""
    if options.iteration is not None or options.sidecar_folder is not None:
        raise RefusedError(
            f"{source}: is transformers', which has no iteration and no sidecar; leave these flags "
            f"out"
        )
    described = model.read(source)
    weights = files.read(source)
    tensors, dropped = _checked(described, weights)
    known = described.architecture
    naming = NameResolver(
        described.family,
        Layout(),
        None,
        None,
        Sizes(known.heads, known.groups, known.vocab),
        gated=FAMILIES[described.family].gated,
        tied=known.tied,
    )
    index = Index(
        [
            naming.hold(TensorEntry(name, Place(), MAIN_PARAM, stored))
            for name, stored in tensors.items()
        ],
        Layout(),
    )
    index.check_complete()
    notes = [
        f"{weights.taken}: was taken, as transformers does, and not {', '.join(weights.ignored)}"
    ]
    return Checkpoint(
        "transformers",
        source,
        0,
        Layout(),
        index,
        False,
        known.layers,
        rank_folders={(0, 0, 0): source},
        rank_metadata={(0, 0, 0): {"config": dict(described.config)}},
        dropped=dropped,
        notes=notes if weights.ignored else [],
    )


def _checked(described: ModelConfig, weights: Weights) -> tuple[dict[str, Stored], list[str]]:
    """The model's tensors, and the names of those that are none of its parameters."""
    prefix = described.terms.prefix
    prefix = prefix if any(name.startswith(prefix) for name in weights.tensors) else ""
    expected = {
        one.name if one.canonical == HEAD else prefix + one.name: one.lying
        for one in described.tensors()
    }
    allowed = expected | _tied_head(described, expected, prefix)
    dropped = sorted(
        name
        for name in weights.tensors
        if name.endswith(described.terms.buffers) and name not in allowed
    )
    tensors = {name: stored for name, stored in weights.tensors.items() if name not in dropped}
    for names, what in (
        (expected.keys() - tensors.keys(), "lacks"),
        (tensors.keys() - allowed.keys(), "has"),
    ):
        if names:
            rest = (
                "that it should have by"
                if what == "lacks"
                else "that have no place in the model of"
            )
            raise RefusedError(
                f"{weights.taken}: {what} {len(names)} tensors {rest} {CONFIG}: "
                f"{shorten_names(sorted(names))}; the two are of different models"
            )
    for name, stored in tensors.items():
        if stored.shape != allowed[name]:
            raise RefusedError(
                f"{weights.taken}: {name} has the shape {list(stored.shape)}, and {CONFIG} asks "
                f"for {list(allowed[name])}; the two are of different models"
            )
        if stored.dtype not in DTYPES:
            raise RefusedError(
                f"{weights.taken}: {name} is {stored.dtype}, which no weight is; convert the model "
                "that this one was made of"
            )
    return tensors, dropped


def _tied_head(
    described: ModelConfig, expected: dict[str, tuple[int, ...]], prefix: str
) -> dict[str, tuple[int, ...]]:
    """The head that may be stored though it is the word embedding."""
    if described.is_base or not described.architecture.tied:
        return {}
    names = {canonical: name for canonical, (name, _) in rows_of(described.family).items()}
    return {names[HEAD]: expected[prefix + names[WORD_EMBEDDING]]}
