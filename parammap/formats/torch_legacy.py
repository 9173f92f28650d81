"""Checkpoints of torch.save before its zip archives, which it still writes with
_use_new_zipfile_serialization=False; and tensors that lie strided in their storage, in files of
either kind.

Pickles follow each other: magic number, protocol, what the machine was like, the object, the keys
of its storages; then, in the order of the keys, each storage: the number of its elements (int64,
little-endian) and their bytes. The object names a storage by the persistent id ("storage", storage
class, key, device, number of elements, view).

Source: torch/serialization.py of PyTorch 0.4 to 2.13 (_legacy_save, _legacy_load);
torch/csrc/generic/serialization.cpp."""

from __future__ import annotations

import os
import pickletools
import struct
from typing import Any, BinaryIO

from parammap.errors import RefusedError
from parammap.formats import pickle_writer, pickles, regular_file, torch_zip
from parammap.formats.format import TreeFormat, subscripts
from parammap.formats.frames import Frame, FrameBuilder
from parammap.formats.pickles import Opaque
from parammap.formats.torch_zip import Storage
from parammap.tensors.logical import ITEMSIZE, Extent, Stored, TensorSpec

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_SYSTEM = {
    "protocol_version": _PROTOCOL,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}
#: how such a file begins: the pickle of the magic number (protocol 2)
_HEAD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_NUMEL = struct.Struct("<q")
_PREFIX = "legacy"


def is_legacy(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as such a checkpoint does; False for one that cannot be read."""
    try:
        with regular_file.opened(path) as stream:
            return stream.read(len(_HEAD)) == _HEAD
    except RefusedError:
        return False


def read_either(path: str | os.PathLike[str]) -> Any:
    """The pickled object of a torch.save of either kind, with a Stored in place of each tensor."""
    return read(path) if is_legacy(path) else torch_zip.read(path, kind=torch_zip.Views)


def read(path: str | os.PathLike[str]) -> Any:
    """The pickled object, with a Stored in place of each tensor and parameter; reads the pickles
    and the storages' sizes only.

    Raises RefusedError if the file is missing, truncated, of another format, big-endian, or holds a
    tensor that is neither contiguous nor a strided matrix."""
    file = os.fspath(path)
    with regular_file.opened(file) as stream:
        return _read(file, stream)


def _read(file: str, stream: BinaryIO) -> Any:
    magic, protocol, system = (pickles.loads(_pickle(file, stream), file) for _ in range(3))
    if (magic, protocol) != (_MAGIC, _PROTOCOL):
        raise RefusedError(f"{file}: is no checkpoint of torch.save; check the path")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RefusedError(
            f"{file}: holds big-endian numbers; load it and save it again on a little-endian "
            f"machine"
        )
    pickled = _pickle(file, stream)
    kinds: dict[str, tuple[Any, ...]] = {}
    pickles.loads(
        pickled,
        file,
        persistent_load=lambda named: kinds.setdefault(_five(file, named)[2], named[1:5]),
    )
    keys = pickles.loads(_pickle(file, stream), file)
    if (
        not isinstance(keys, list)
        or not all(isinstance(key, str) for key in keys)
        or sorted(keys) != sorted(kinds)
    ):
        raise RefusedError(
            f"{file}: its list of storages is not that of its tensors; the file is damaged"
        )
    reader = _Legacy(file, _PREFIX, _storages(file, stream, keys, kinds))
    return pickles.loads(pickled, file, reader.calls(), reader.storage)


class _Bounded:
    """A stream for the opcodes of a pickle, none of which may be longer than a whole pickle may."""

    def __init__(self, file: str, stream: BinaryIO) -> None:
        self.file, self.stream, self.tell = file, stream, stream.tell
        self.readline = lambda: stream.readline(pickles.MAX_PICKLE_NBYTES)

    def read(self, nbytes: int) -> bytes:
        if nbytes > pickles.MAX_PICKLE_NBYTES:
            raise RefusedError(
                f"{self.file}: its pickle holds {nbytes} bytes in one; tensors belong outside the "
                f"pickle"
            )
        return self.stream.read(nbytes)


def _pickle(file: str, stream: BinaryIO) -> bytes:
    """The pickle that begins here; leaves the stream at its end."""
    start = stream.tell()
    bounded: Any = _Bounded(file, stream)  # all that genops needs of an IO
    try:
        for _ in pickletools.genops(bounded):
            if stream.tell() - start > pickles.MAX_PICKLE_NBYTES:
                raise RefusedError(
                    f"{file}: its pickle is longer than {pickles.MAX_PICKLE_NBYTES} bytes; tensors "
                    f"belong "
                    "outside the pickle"
                )
    except (ValueError, struct.error, IndexError, OverflowError) as error:
        raise RefusedError(
            f"{file}: its pickle is damaged ({error}); copy the file again from its source"
        ) from error
    end = stream.tell()
    stream.seek(start)
    return stream.read(end - start)


def _five(file: str, named: Any) -> tuple[Any, ...]:
    """A persistent id as archives have it, without the view, which torch has not used since 0.4."""
    return torch_zip.storage_id(named, file, length=6)[:5]


def _storages(
    file: str, stream: BinaryIO, keys: list[Any], kinds: dict[str, tuple[Any, ...]]
) -> dict[str, Extent]:
    """Where each storage lies, under the name that an archive would give it."""
    size, records = os.fstat(stream.fileno()).st_size, {}
    for key in keys:
        head = stream.read(_NUMEL.size)
        kind, _, _, numel = kinds[key]
        if len(head) < _NUMEL.size:
            raise RefusedError(
                f"{file}: ends before its storage {key!r}; it is truncated: copy it again"
            )
        if _NUMEL.unpack(head) != (numel,):
            raise RefusedError(
                f"{file}: storage {key!r} has {_NUMEL.unpack(head)[0]} elements and not {numel}; "
                f"the file is "
                "damaged"
            )
        dtype = torch_zip._DTYPE_OF_STORAGE.get(getattr(kind, "name", ""))
        start, nbytes = stream.tell(), numel * (ITEMSIZE[dtype] if dtype else 1)
        if start + nbytes > size:
            raise RefusedError(
                f"{file}: ends inside its storage {key!r}; it is truncated: copy it again"
            )
        records[f"{_PREFIX}/data/{key}"] = Extent(file, start, nbytes)
        stream.seek(start + nbytes)
    return records


class _Legacy(torch_zip.Views):
    def storage(self, persistent_id: Any) -> Storage:
        return super().storage(_five(self.file, persistent_id))


def frame(tree: Any, name: str = "") -> Frame:
    """The file from which torch.load gives `tree` (see torch_zip.frame); such a file holds no name.

    Raises TypeError for a leaf that cannot be written, and for a tensor of a dtype without a typed
    storage class."""
    storages = _LegacyStorages()
    pickled = pickle_writer.dumps(tree, {Stored: storages.record, TensorSpec: storages.record})
    keys = [str(number) for number in range(len(storages.tensors))]
    builder = FrameBuilder()
    builder.literal(
        b"".join(
            [
                *map(pickle_writer.dumps, (_MAGIC, _PROTOCOL, _SYSTEM)),
                pickled,
                pickle_writer.dumps(keys),
            ]
        )
    )
    for key in keys:
        tensor = storages.tensors[int(key)]
        builder.literal(_NUMEL.pack(tensor.nbytes // ITEMSIZE[tensor.dtype]))
        builder.content(int(key), torch_zip._as_spec(int(key), tensor), 0, tensor.nbytes)
    return Frame(builder.segments(), storages.tensors)


class _LegacyStorages(torch_zip._Storages):
    def record(self, tensor: TensorSpec | Stored) -> Opaque:
        if tensor.dtype not in torch_zip._STORAGE_OF_DTYPE:
            raise TypeError(
                f"a tensor of {tensor.dtype} has no storage class in torch's format from before 1.6"
            )
        made = super().record(tensor)
        storage, *rest = made.args
        return Opaque(made.target, (pickle_writer.PersistentId((*storage.value, None)), *rest))


FORMAT = TreeFormat(
    name="torch-legacy",
    suffixes=torch_zip.SUFFIXES,
    magic=_HEAD,
    entries=lambda path: dict(subscripts(read(path))),
    structure=lambda path, offset: "a pickle, or the size of a storage",
    read_tree=read,
    frame_tree=frame,
)
