"""What a checkpoint's file holds, whatever its format: its tensors by the key that its own loader
knows them by, and what lies between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from numpy.lib.format import MAGIC_PREFIX

from parammap.errors import RefusedError
from parammap.formats import mindspore_ckpt, npy, safetensors, torch_legacy, zip_records
from parammap.tensors.logical import Stored

#: endings of files that torch.save writes
PICKLED = (".pt", ".pth", ".bin")


def entries_of(file: Path) -> list[tuple[str, Stored]]:
    """The tensors in a file, each with its key; in a file of torch.save that is the Python
    subscription, `['model'][…]`, and the one array of a numpy file has the file's name.

    Raises RefusedError if the file is of no format that can be read, or damaged.
    """
    return list(_entries(file))


def structure_at(file: Path, offset: int) -> str:
    """What lies at a byte that belongs to no tensor."""
    if torch_legacy.is_legacy(file):
        return "a pickle, or the size of a storage"
    if _format(file) not in PICKLED:
        return _STRUCTURE.get(_format(file), "no part of a tensor")
    for name, extent in zip_records.read(file).items():
        if extent.offset <= offset < extent.offset + extent.nbytes:
            return f"record {name} of the zip archive"
    return "structure of the zip archive: headers, padding or directory"


_STRUCTURE = {
    ".ckpt": "a record's header: name, dims and type",
    ".safetensors": "the header, in JSON",
    ".npy": "the header: dtype, order and shape",
}


def _entries(file: Path) -> Iterator[tuple[str, Stored]]:
    reader = _READERS.get(_format(file))
    if reader is None:
        raise RefusedError(
            f"{file}: is no {', '.join(_READERS)} file, so nobody knows what lies where in it"
        )
    return reader(file)


def _format(file: Path) -> str:
    """The ending that says a file's format; numpy's files may have another or none, and begin with
    its magic bytes."""
    if file.suffix in _READERS:
        return file.suffix
    with open(file, "rb") as stream:
        return ".npy" if stream.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX else file.suffix


def _flat(read: Callable) -> Callable[[Path], Iterator[tuple[str, Stored]]]:
    return lambda file: (
        (name, stored) for name, stored in read(file).items() if isinstance(stored, Stored)
    )


def _tree(file: Path) -> Iterator[tuple[str, Stored]]:
    return _leaves(torch_legacy.read_either(file), "")


def _leaves(tree: object, path: str) -> Iterator[tuple[str, Stored]]:
    if isinstance(tree, Stored):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}[{_key(key)}]")
    elif isinstance(tree, (list, tuple)):
        for number, value in enumerate(tree):
            yield from _leaves(value, f"{path}[{number}]")


def _key(key: object) -> str:
    if isinstance(key, tuple):
        return f"({', '.join(map(_key, key))})"
    return repr(key) if isinstance(key, (str, int)) else str(key)


def _array(file: Path) -> Iterator[tuple[str, Stored]]:
    yield file.name, npy.read(file)


_READERS = {
    ".ckpt": _flat(mindspore_ckpt.read),
    ".safetensors": _flat(safetensors.read),
    ".npy": _array,
    **dict.fromkeys(PICKLED, _tree),
}
