"""Checkpoints of torch.distributed.checkpoint: a `.metadata` file beside `*.distcp` files, all in
one folder.

`.metadata` is one pickle that says of each tensor its shape and its chunks, and of each chunk and
each other object the part of a .distcp file that holds it; every such part is an archive of
torch.save of its own. Source: PyTorch 2.2 to 2.13,
torch/distributed/checkpoint/{metadata,filesystem}.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from parammap.errors import RefusedError
from parammap.formats import pickle_writer, pickles, torch_zip
from parammap.formats.frames import Crc, Frame, Hole, total_nbytes
from parammap.formats.pickles import Global, Opaque, Size
from parammap.tensors.logical import Extent, Stored, count_of, shape_of

METADATA = ".metadata"
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"

#: by key, and for a tensor the offsets of a chunk
_Archives: TypeAlias = dict[tuple[str, tuple[int, ...] | None], Extent]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor: where it begins, how long it is in each dimension, and the archive that
    holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    archive: Extent


@dataclass(frozen=True, slots=True)
class Chunked:
    """A tensor as its chunks."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def read(self, chunk: Chunk) -> Stored:
        """Where a chunk's elements lie, from its archive's header. Raises RefusedError if they are
        not as described."""
        stored = torch_zip.read(chunk.archive.file, chunk.archive)
        if (
            not isinstance(stored, Stored)
            or stored.dtype != self.dtype
            or stored.numel != math.prod(chunk.sizes)
        ):
            raise RefusedError(
                f"{chunk.archive.file}: what lies at byte {chunk.archive.offset} is not a chunk of "
                f"{self.key} as {METADATA} names it; the files are of different saves"
            )
        return stored


@dataclass(slots=True)
class Contents:
    """What `.metadata` lists: tensors, the archives of other objects, and what megatron-core adds
    of its own."""

    folder: Path
    tensors: dict[str, Chunked]
    objects: dict[str, Extent]
    mcore: dict[str, dict[str, Any]] = field(default_factory=dict)

    def load(self, key: str) -> Any:
        """An object that is no tensor, as the restricted unpickler gives it."""
        archive = self.objects[key]
        return torch_zip.read(archive.file, archive)


def recognizes(folder: Path) -> bool:
    return (folder / METADATA).is_file()


def read(folder: Path) -> Contents:
    """The list of what a checkpoint holds; reads `.metadata` alone.

    Raises RefusedError if that is missing, damaged, or names a file that is missing, or a kind of
    storage other than torch.save's."""
    file = folder / METADATA
    root = pickles.read(file)
    try:
        archives = _archives(folder, root.attributes["storage_data"])
        tensors, objects = {}, {}
        for key, entry in root.attributes["state_dict_metadata"].items():
            if entry.target.name == "TensorStorageMetadata":
                tensors[key] = _tensor(key, entry.attributes, archives)
            elif entry.target.name == "BytesStorageMetadata":
                objects[key] = archives[key, None]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RefusedError(
            f"{file}: is not the metadata of a distributed checkpoint ({type(error).__name__}: "
            f"{error}); "
            "copy it again from its source"
        ) from error
    return Contents(folder, tensors, objects, root.attributes.get("mcore_data") or {})


def _archives(folder: Path, storage: dict[Any, Any]) -> _Archives:
    archives, sizes = {}, {}
    for index, info in storage.items():
        at, where = index.attributes, info.attributes
        if where.get("transform_descriptors"):
            raise RefusedError(
                f"{folder / METADATA}: {at['fqn']} is stored compressed or encrypted; save it "
                f"without"
            )
        path = folder / where["relative_path"]
        if path.parent != folder:
            raise RefusedError(
                f"{folder / METADATA}: names the file {path}, which is not in its folder"
            )
        if path not in sizes:
            sizes[path] = _size(path)
        start, nbytes = count_of(where["offset"]), count_of(where["length"])
        if start + nbytes > sizes[path]:
            raise RefusedError(
                f"{path}: ends before {at['fqn']} does; copy it again from its source"
            )
        offset = at.get("offset")
        archives[at["fqn"], None if offset is None else shape_of(offset)] = Extent(
            str(path), start, nbytes
        )
    return archives


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise RefusedError(f"{path}: missing; copy the whole checkpoint") from error


def _tensor(key: str, entry: dict[str, Any], archives: _Archives) -> Chunked:
    properties = entry["properties"].state
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    chunks = {}
    for chunk in entry["chunks"]:
        offsets, sizes = (shape_of(chunk.attributes[name]) for name in ("offsets", "sizes"))
        chunks[offsets] = Chunk(offsets, sizes, archives[key, offsets])
    return Chunked(key, dtype.name, shape_of(entry["size"]), tuple(chunks.values()))


# --------------------------------------------------------------------------------------------------------------
# writing


@dataclass(slots=True)
class DistcpFile:
    """A .distcp file in the making: archives one after the other."""

    name: str
    frame: Frame = field(default_factory=lambda: Frame([], []))
    nbytes: int = 0

    def add(self, tree: Any) -> Extent:
        """Append the archive of a tensor (a TensorSpec) or of any other object; gives its place."""
        archive = torch_zip.frame(tree, "archive")
        start, first = self.nbytes, len(self.frame.tensors)
        for segment in archive.segments:
            if isinstance(segment, Hole):
                segment = replace(segment, tensor=segment.tensor + first)
            elif isinstance(segment, Crc):
                segment = replace(segment, start=segment.start + start, end=segment.end + start)
            self.frame.segments.append(segment)
        self.frame.tensors.extend(archive.tensors)
        self.nbytes += total_nbytes(archive.segments)
        return Extent(self.name, start, self.nbytes - start)


def metadata(tensors: list[Chunked], objects: dict[str, Extent]) -> bytes:
    """The `.metadata` of these tensors and objects, whose archives name files of the same
    folder."""
    described = {
        tensor.key: _record(
            "TensorStorageMetadata",
            {
                "properties": _properties(tensor.dtype),
                "size": Size(tensor.shape),
                "chunks": [
                    _record(
                        "ChunkStorageMetadata",
                        {"offsets": Size(chunk.offsets), "sizes": Size(chunk.sizes)},
                    )
                    for chunk in tensor.chunks
                ],
            },
        )
        for tensor in tensors
    }
    described |= {key: _record("BytesStorageMetadata", {}) for key in objects}
    storage = {
        _index(tensor.key, Size(chunk.offsets)): _info(chunk.archive)
        for tensor in tensors
        for chunk in tensor.chunks
    }
    storage |= {_index(key, None): _info(archive) for key, archive in objects.items()}
    return pickle_writer.dumps(
        _record(
            "Metadata",
            {
                "state_dict_metadata": described,
                "planner_data": None,
                "storage_data": storage,
                "storage_meta": None,
            },
        )
    )


def _record(name: str, state: Any, module: str = _METADATA_MODULE) -> Opaque:
    return Opaque(Global(module, name), (), new=True, state=state)


def _properties(dtype: str) -> Opaque:
    """A plain tensor's: dtype, layout, whether it requires a gradient, memory format, whether it is
    pinned."""
    layout = Opaque(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Opaque(Global(_METADATA_MODULE, "_MEM_FORMAT_ENCODING"), (0,))
    return _record("TensorProperties", (Global("torch", dtype), layout, False, contiguous, False))


def _index(key: str, offsets: Size | None) -> Opaque:
    return _record("MetadataIndex", {"fqn": key, "offset": offsets, "index": None})


def _info(archive: Extent) -> Opaque:
    return _record(
        "_StorageInfo",
        {"relative_path": archive.file, "offset": archive.offset, "length": archive.nbytes},
        "torch.distributed.checkpoint.filesystem",
    )
