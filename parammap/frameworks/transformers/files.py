"""A model's folder: its weights in one file or in shards that an index lists, as safetensors or
pickled.

Source: transformers 4.57 (utils/__init__.py: names; modeling_utils.py: which one is taken,
save_pretrained); huggingface_hub 0.36 (serialization/_base.py: how shards are filled and numbered).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from parammap.errors import RefusedError
from parammap.formats import json_document, registry, safetensors, torch_zip
from parammap.formats.format import FlatFormat, TreeFormat
from parammap.tensors.logical import Stored, TensorSpec
from parammap.tensors.names import shorten_names

SAFETENSORS, BIN = "safetensors", "bin"
#: by the names that --format has for them
FORMATS: dict[str, FlatFormat | TreeFormat] = {
    SAFETENSORS: safetensors.FORMAT,
    BIN: torch_zip.FORMAT,
}
#: by format: the one file of weights, of which shards and index have their names
NAMES = {SAFETENSORS: "model.safetensors", BIN: "pytorch_model.bin"}
#: in the order in which the library takes them
_CHOICES = tuple(name for whole in NAMES.values() for name in (whole, f"{whole}.index.json"))


@dataclass(frozen=True, slots=True)
class Weights:
    """A folder's tensors by name, the file or index that says so, and those that it has beside and
    were not taken."""

    tensors: dict[str, Stored]
    taken: Path
    ignored: tuple[str, ...]


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _CHOICES)


def read(folder: Path) -> Weights:
    """Where each tensor lies, from headers and the index. Raises RefusedError for files that are
    missing or damaged, and for an index that does not say what the files hold."""
    there = [name for name in _CHOICES if (folder / name).is_file()]
    if not there:
        raise RefusedError(f"{folder}: has none of {', '.join(_CHOICES)}; copy the whole folder")
    taken = folder / there[0]
    tensors = _indexed(taken) if taken.suffix == ".json" else _content(taken)
    return Weights(tensors, taken, tuple(there[1:]))


def index_name(kind: str) -> str:
    return f"{NAMES[kind]}.index.json"


def shard_name(kind: str, number: int, count: int) -> str:
    """The name of shard `number`, from 0 on, of so many."""
    stem, suffix = PurePath(NAMES[kind]).stem, PurePath(NAMES[kind]).suffix
    return f"{stem}-{number + 1:05d}-of-{count:05d}{suffix}" if count > 1 else NAMES[kind]


def shards(specs: Iterable[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """The tensors in files of at most `limit` bytes, in their order; one that is larger has a file
    of its own."""
    done: list[list[TensorSpec]] = []
    current: list[TensorSpec] = []
    nbytes = 0
    for spec in specs:
        if spec.nbytes > limit:
            done.append([spec])
            continue
        if nbytes + spec.nbytes > limit:
            done.append(current)
            current, nbytes = [], 0
        current.append(spec)
        nbytes += spec.nbytes
    return [*done, current] if current else done


def _indexed(index: Path) -> dict[str, Stored]:
    listed: dict[str, set[str]] = {}
    for name, file in _weight_map(index).items():
        listed.setdefault(file, set()).add(name)
    _check_files(index, set(listed))
    tensors: dict[str, Stored] = {}
    for file, names in sorted(listed.items()):
        content = _content(index.parent / file)
        for lying, what in ((names - set(content), "lacks"), (set(content) - names, "holds")):
            if lying:
                raise RefusedError(
                    f"{index.parent / file}: {what} {len(lying)} tensors that {index.name} says it "
                    f"{'holds' if what == 'lacks' else 'does not'}: "
                    f"{shorten_names(sorted(lying))}; the files are of "
                    "different saves: copy the whole folder again"
                )
        tensors |= content
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    found: dict[str, str] = json_document.read(
        index, json_document.check_of("weights_index"), "copy it again"
    )["weight_map"]
    return found


def _check_files(index: Path, names: set[str]) -> None:
    suffix = PurePath(index.name.removesuffix(".index.json")).suffix
    if outside := sorted(
        name for name in names if PurePath(name).name != name or PurePath(name).suffix != suffix
    ):
        raise RefusedError(
            f"{index}: names {', '.join(outside[:3])}, and every shard is a {suffix} file of the "
            f"same "
            "folder; the index is wrong"
        )
    if missing := sorted(name for name in names if not (index.parent / name).is_file()):
        raise RefusedError(
            f"{index.parent / missing[0]}: missing, as {len(missing)} of the {len(names)} files "
            f"that "
            f"{index.name} names; copy the whole folder"
        )


def _content(file: Path) -> dict[str, Stored]:
    found = registry.of(file)
    content = found.read_tree(file) if isinstance(found, TreeFormat) else found.entries(file)
    if not isinstance(content, dict):
        raise RefusedError(
            f"{file}: holds a {type(content).__name__} and no model's tensors by name; check the "
            f"path"
        )
    if other := sorted(
        str(name) for name, value in content.items() if not isinstance(value, Stored)
    ):
        raise RefusedError(
            f"{file}: holds {shorten_names(other)} beside tensors; a transformers model has "
            f"tensors only"
        )
    return content
