"""Checkpoints of torch.save (torch 1.6 and later): a zip archive with a pickle and one record per
tensor storage.

Source: torch/serialization.py and torch/_utils.py of PyTorch 1.6 to 2.13. Records, all under the
archive's name: `data.pkl`; `byteorder`; `data/<key>`, the bytes of storage <key>; `version`;
`.format_version` and `.storage_alignment` from torch 2.7 on. The pickle names a storage by the
persistent id ("storage", storage class, key, device, number of elements)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from parammap.errors import RefusedError
from parammap.formats import pickle_writer, pickles, zip_records
from parammap.formats.format import TreeFormat, subscripts
from parammap.formats.frames import Frame
from parammap.formats.pickles import Global, Opaque
from parammap.formats.zip_records import Record
from parammap.tensors.logical import ITEMSIZE, Extent, Stored, TensorSpec, count_of, shape_of

_DTYPE_OF_STORAGE = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_STORAGE_OF_DTYPE = {
    dtype: Global("torch", storage) for storage, dtype in _DTYPE_OF_STORAGE.items()
}
_UNTYPED = Global("torch.storage", "UntypedStorage")

_REBUILD_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_TENSOR_OF_DTYPE = Global("torch._utils", "_rebuild_tensor_v3")
_ORDERED_DICT = Global("collections", "OrderedDict")
_PLAIN_TENSOR_TYPES = (Global("torch", "Tensor"), Global("torch.nn.parameter", "Parameter"))
#: tensors that are not one dense box of bytes
_UNSUPPORTED = (
    "_rebuild_sparse_tensor",
    "_rebuild_sparse_csr_tensor",
    "_rebuild_nested_tensor",
    "_rebuild_qtensor",
    "_rebuild_meta_tensor_no_storage",
    "_rebuild_wrapper_subclass",
    "_rebuild_device_tensor_from_numpy",
    "_rebuild_device_tensor_from_cpu_tensor",
    "_rebuild_xla_tensor",
)

#: of files of either kind that torch.save writes
SUFFIXES = (".pt", ".pth", ".bin")
_VERSION, _BYTE_ORDER, _FORMAT_VERSION, _STORAGE_ALIGNMENT = b"3\n", b"little", b"1", b"64"


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage: elements of `dtype` (None: plain bytes) in `extent`; left in a tree only if it was
    saved bare."""

    dtype: str | None
    extent: Extent


def read(
    path: str | os.PathLike[str],
    within: Extent | None = None,
    kind: type[TensorReader] | None = None,
) -> Any:
    """The pickled object, with a Stored in place of each tensor and parameter; reads headers and
    the pickle only.

    `within` is the part of the file that is the archive, if not all of it; `kind` is who makes a
    Stored of a tensor. Everything that is not plain Python is inert (see `pickles`). Whether a
    tensor required a gradient, was a Parameter, carried Python attributes or lay on which device is
    not kept; tensors that share a storage have overlapping extents. Raises RefusedError if the file
    is missing, truncated, of another format, big-endian, or holds a tensor that is not contiguous
    or not of a dtype in ITEMSIZE."""
    file = os.fspath(path)
    records = zip_records.read(file, within)
    prefix = _archive_name(file, records)
    byte_order = records.get(f"{prefix}/byteorder")
    if byte_order and zip_records.read_record(byte_order) != _BYTE_ORDER:
        raise RefusedError(
            f"{file}: holds big-endian numbers; load it and save it again on a little-endian "
            f"machine"
        )
    pickled = records[f"{prefix}/data.pkl"]
    if pickled.nbytes > pickles.MAX_PICKLE_NBYTES:
        raise RefusedError(
            f"{file}: its data.pkl has {pickled.nbytes} bytes; tensors belong outside the pickle"
        )
    reader = (kind or TensorReader)(file, prefix, records)
    return pickles.loads(zip_records.read_record(pickled), file, reader.calls(), reader.storage)


def _archive_name(file: str, records: Mapping[str, Extent]) -> str:
    names = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(names) != 1 or f"{names[0]}/constants.pkl" in records:
        raise RefusedError(
            f"{file}: is a zip archive but not a checkpoint of torch.save; check the path"
        )
    return names[0]


def storage_id(named: Any, file: str, length: int = 5) -> tuple[Any, ...]:
    """A persistent id: "storage", kind, key, device, number of elements; in older files then a
    view, which is None. Raises RefusedError for what is none."""
    if (
        not isinstance(named, tuple)
        or len(named) != length
        or named[0] != "storage"
        or not isinstance(named[1], Global)
        or not isinstance(named[2], str)
        or type(named[4]) is not int
        or named[5:] not in ((), (None,))
    ):
        raise RefusedError(
            f"{file}: has a persistent id that is not that of a whole storage; load it and save it "
            "again with a current torch.save"
        )
    return named


class TensorReader:
    """Resolves the storages and tensors that one archive's pickle names."""

    def __init__(self, file: str, prefix: str, records: Mapping[str, Extent]) -> None:
        self.file = file
        self.prefix = prefix
        self.records = records
        self._storages: dict[tuple[Any, ...], Storage] = {}

    def calls(self) -> dict[Global, Callable[..., Any]]:
        """What each of torch's rebuild functions yields."""
        yields: dict[Global, Callable[..., Any]] = {
            _REBUILD_TENSOR: self.tensor,
            _REBUILD_TENSOR_OF_DTYPE: self.tensor_of_dtype,
            Global("torch._utils", "_rebuild_tensor"): self.tensor,
            Global("torch._utils", "_rebuild_parameter"): self.parameter,
            Global("torch._utils", "_rebuild_parameter_with_state"): self.parameter,
            Global("torch._tensor", "_rebuild_from_type_v2"): self.tensor_with_attributes,
        }
        return yields | {
            Global("torch._utils", name): self._unsupported(name) for name in _UNSUPPORTED
        }

    def storage(self, persistent_id: Any) -> Storage:
        _, kind, key, _, numel = storage_id(persistent_id, self.file)
        known = self._storages.get((kind, key, numel))
        if known is None:
            known = self._storages[kind, key, numel] = self._new_storage(kind, key, numel)
        return known

    def _new_storage(self, kind: Global, key: str, numel: int) -> Storage:
        extent = self.records.get(f"{self.prefix}/data/{key}")
        if extent is None:
            raise RefusedError(
                f"{self.file}: lacks the storage {key!r} that its pickle names; the file is damaged"
            )
        dtype = _DTYPE_OF_STORAGE.get(kind.name)
        if dtype is None and kind.name != _UNTYPED.name:
            raise RefusedError(
                f"{self.file}: storage {key!r} is a {kind}; only {', '.join(_DTYPE_OF_STORAGE)}"
                " can be converted"
            )
        if extent.nbytes != numel * (ITEMSIZE[dtype] if dtype else 1):
            raise RefusedError(
                f"{self.file}: storage {key!r} has {extent.nbytes} bytes for {numel} elements;"
                " the file is damaged"
            )
        return Storage(dtype, extent)

    def tensor(
        self, storage: Storage, offset: Any, shape: Any, stride: Any, *_flags: Any
    ) -> Stored:
        """Flags: requires_grad, backward hooks, metadata. `offset` counts elements."""
        if not isinstance(storage, Storage) or storage.dtype is None:
            raise RefusedError(f"{self.file}: a tensor has no typed storage; the file is damaged")
        return self._box(
            storage.extent, storage.dtype, count_of(offset), shape_of(shape), shape_of(stride)
        )

    def tensor_of_dtype(
        self,
        storage: Storage,
        offset: Any,
        shape: Any,
        stride: Any,
        _requires_grad: bool,
        _hooks: Any,
        dtype: Global,
        *_metadata: Any,
    ) -> Stored:
        """A tensor whose dtype has no typed storage class, such as uint16."""
        if not isinstance(storage, Storage) or dtype.name not in ITEMSIZE:
            raise RefusedError(
                f"{self.file}: a tensor is of {dtype}, which cannot be converted; only"
                f" {', '.join(ITEMSIZE)} can"
            )
        return self._box(
            storage.extent, dtype.name, count_of(offset), shape_of(shape), shape_of(stride)
        )

    def parameter(self, data: Any, *_flags: Any) -> Any:
        return data

    def tensor_with_attributes(
        self, rebuild: Global, kind: Global, args: tuple[Any, ...], _attributes: Any
    ) -> Any:
        """A tensor that carries Python attributes, or is of a subclass of torch.Tensor."""
        call = self.calls().get(rebuild)
        if kind not in _PLAIN_TENSOR_TYPES or call is None:
            raise RefusedError(
                f"{self.file}: holds a {kind}, which is no plain tensor; save plain tensors instead"
            )
        return call(*args)

    def _box(
        self,
        extent: Extent,
        dtype: str,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> Stored:
        start = extent.offset + offset * ITEMSIZE[dtype]
        stored = Stored(dtype, shape, (Extent(self.file, start, _nbytes(dtype, shape)),))
        if start + stored.nbytes > extent.offset + extent.nbytes:
            raise RefusedError(
                f"{self.file}: a tensor {shape} reaches beyond its storage; the file is damaged"
            )
        if not _is_contiguous(shape, stride):
            raise RefusedError(
                f"{self.file}: a tensor of shape {shape} has strides {stride}; only contiguous "
                f"tensors"
                " can be converted: save tensor.contiguous()"
            )
        return stored

    def _unsupported(self, name: str) -> Callable[..., Any]:
        def refuse(*_args: Any) -> None:
            raise RefusedError(
                f"{self.file}: holds a tensor made by torch._utils.{name}; only dense tensors can "
                f"be"
                " converted"
            )

        return refuse


class Views(TensorReader):
    """Resolves tensors that may be strided matrices."""

    def _box(
        self,
        extent: Extent,
        dtype: str,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> Stored:
        if len(shape) != 2 or 0 in shape or _is_contiguous(shape, stride) or 1 not in stride:
            return super()._box(extent, dtype, offset, shape, stride)
        start, itemsize = extent.offset + offset * ITEMSIZE[dtype], ITEMSIZE[dtype]
        inner = int(stride[1] == 1)
        if stride[1 - inner] < shape[inner]:
            return super()._box(extent, dtype, offset, shape, stride)
        span = (
            sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) * itemsize
            + itemsize
        )
        if start + span > extent.offset + extent.nbytes:
            raise RefusedError(
                f"{self.file}: a tensor {shape} reaches beyond its storage; the file is damaged"
            )
        return Stored(dtype, shape, (Extent(self.file, start, span),), stride)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return Stored(dtype, shape, ()).nbytes


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements lie row-major without gaps; the stride of a dimension of size 1 does not
    matter."""
    if 0 in shape:
        return True
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def frame(tree: Any, name: str = "archive.pt") -> Frame:
    """The file, to be called `name`, from which torch.load gives `tree`.

    Leaves: TensorSpec and Stored become CPU tensors, the rest is what `pickles` reads and plain
    Python values. Equal Stored leaves share a storage; a TensorSpec shares one only with itself,
    whatever its name. Raises TypeError for any other leaf."""
    storages = _Storages()
    pickled = pickle_writer.dumps(tree, {Stored: storages.record, TensorSpec: storages.record})
    contents: list[tuple[str, bytes | tuple[int, TensorSpec]]] = [
        ("data.pkl", pickled),
        (".format_version", _FORMAT_VERSION),
        (".storage_alignment", _STORAGE_ALIGNMENT),
        ("byteorder", _BYTE_ORDER),
        *(
            (f"data/{key}", (key, _as_spec(key, tensor)))
            for key, tensor in enumerate(storages.tensors)
        ),
        ("version", _VERSION),
    ]
    prefix = PurePath(name).stem
    records = [Record(f"{prefix}/{record}", content) for record, content in contents]
    return Frame(zip_records.frame(records), storages.tensors)


def _as_spec(key: int, tensor: TensorSpec | Stored) -> TensorSpec:
    return (
        tensor
        if isinstance(tensor, TensorSpec)
        else TensorSpec(f"data/{key}", tensor.dtype, tensor.shape)
    )


class _Storages:
    """Gives each distinct tensor of a tree its storage key, and the pickled form that refers to
    it."""

    def __init__(self) -> None:
        self.tensors: list[TensorSpec | Stored] = []
        self._keys: dict[Stored | int, int] = {}

    def record(self, tensor: TensorSpec | Stored) -> Opaque:
        identity = tensor if isinstance(tensor, Stored) else id(tensor)
        key = self._keys.setdefault(identity, len(self.tensors))
        if key == len(self.tensors):
            self.tensors.append(tensor)
        typed = _STORAGE_OF_DTYPE.get(tensor.dtype)
        numel = tensor.nbytes // ITEMSIZE[tensor.dtype] if typed else tensor.nbytes
        storage = pickle_writer.PersistentId(("storage", typed or _UNTYPED, str(key), "cpu", numel))
        args = (storage, 0, tensor.shape, _strides(tensor.shape), False, Opaque(_ORDERED_DICT, ()))
        if typed:
            return Opaque(_REBUILD_TENSOR, args)
        return Opaque(_REBUILD_TENSOR_OF_DTYPE, (*args, Global("torch", tensor.dtype)))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements, as torch counts them: an empty dimension counts as 1."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _read_views(path: Path) -> Any:
    return read(path, kind=Views)


def _structure(path: Path, offset: int) -> str:
    for name, extent in zip_records.read(path).items():
        if extent.offset <= offset < extent.offset + extent.nbytes:
            return f"record {name} of the zip archive"
    return "structure of the zip archive: headers, padding or directory"


FORMAT = TreeFormat(
    name="torch",
    suffixes=SUFFIXES,
    entries=lambda path: dict(subscripts(_read_views(path))),
    structure=_structure,
    read_tree=_read_views,
    frame_tree=frame,
)
