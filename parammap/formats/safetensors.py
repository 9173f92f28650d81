"""safetensors files: an 8-byte little-endian header length, a JSON header, then the tensors' bytes
back to back.

Source: the format section of the README of huggingface/safetensors 0.8. MindSpore 2.7's own reader
is stricter than the library: header keys in the order of their offsets, contiguous from 0, the
exact file size, and no metadata key that is also a tensor's name. What `frame` writes satisfies
both."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from parammap.errors import RefusedError
from parammap.formats import json_document, regular_file
from parammap.formats.format import FlatFormat
from parammap.formats.frames import FrameBuilder, Segment
from parammap.formats.json_schema import compiled
from parammap.tensors.logical import Extent, Stored, TensorSpec, shape_of

#: the format's dtype codes, in the order in which the library sorts tensors (the last come first in
#: a file)
_CODES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(_CODES.values())}
_METADATA = "__metadata__"
#: the library refuses longer headers
_MAX_HEADER_NBYTES = 100_000_000
_COUNTS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}}
_IS_HEADER = compiled(
    {
        "type": "object",
        "properties": {
            _METADATA: {"type": "object", "additionalProperties": {"type": "string"}},
        },
        "additionalProperties": {
            "type": "object",
            "required": ["dtype", "shape", "data_offsets"],
            "properties": {
                "dtype": {"type": "string"},
                "shape": _COUNTS,
                "data_offsets": {**_COUNTS, "minItems": 2, "maxItems": 2},
            },
        },
    }
)


def read(path: str | os.PathLike[str]) -> dict[str, Stored]:
    """Where each tensor's bytes lie, in file order; reads the header only.

    Raises RefusedError if the file is missing, truncated, not safetensors, or holds a dtype that
    cannot be converted."""
    file = os.fspath(path)
    header, start, size = _header(file)
    header.pop(_METADATA, None)
    tensors = {name: _stored(file, start, name, entry) for name, entry in header.items()}
    tensors = dict(
        sorted(tensors.items(), key=lambda item: (item[1].extents[0].offset, item[1].nbytes))
    )
    _check_contiguous(file, tensors, start, size)
    return tensors


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The header's free-form metadata; empty if there is none. Raises RefusedError as `read`
    does."""
    metadata: dict[str, str] = _header(os.fspath(path))[0].get(_METADATA, {})
    return metadata


def frame(
    tensors: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
) -> list[Segment]:
    """The segments of a file that holds `tensors`; MindSpore asks for metadata {"format": "ms"}.

    Tensors are laid out as the library does, larger elements first and then by name, so each is
    aligned to its element. Raises RefusedError if a name occurs twice or collides with metadata.
    """
    metadata = dict(metadata or {})
    _check_names([spec.name for spec in tensors], metadata)
    order = sorted(
        range(len(tensors)), key=lambda index: (-_RANK[tensors[index].dtype], tensors[index].name)
    )
    header: dict[str, object] = {_METADATA: metadata} if metadata else {}
    offset = 0
    for spec in (tensors[index] for index in order):
        header[spec.name] = {
            "dtype": _CODE_OF[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    return _segments(header, tensors, order)


def _segments(
    header: dict[str, object], tensors: Sequence[TensorSpec], order: Sequence[int]
) -> list[Segment]:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    builder = FrameBuilder()
    builder.literal(len(text).to_bytes(8, "little") + text)
    for index in order:
        builder.content(index, tensors[index], 0, tensors[index].nbytes)
    return builder.segments()


def _check_names(names: Sequence[str], metadata: Mapping[str, str]) -> None:
    taken = {_METADATA, *metadata}
    for name in names:
        if name in taken:
            raise RefusedError(f"safetensors: the name {name!r} is used twice; rename the tensor")
        taken.add(name)


def _header(file: str) -> tuple[dict[str, Any], int, int]:
    """The JSON header, the offset of the first tensor's bytes, and the size of the file."""
    with regular_file.opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_NBYTES, size - 8):
            raise RefusedError(
                f"{file}: not a safetensors file, or truncated; copy it again from its source"
            )
        text = stream.read(length)
    header = json_document.parse(
        text, f"{file}: the header", _IS_HEADER, "copy the file again from its source", unique=True
    )
    return header, 8 + length, size


def _stored(file: str, start: int, name: str, entry: Any) -> Stored:
    if (code := entry["dtype"]) not in _CODES:
        raise RefusedError(
            f"{file}: tensor {name!r} has dtype {code!r}; only {', '.join(_CODES)} can be converted"
        )
    try:
        shape = shape_of(entry["shape"])
    except ValueError as error:
        raise RefusedError(f"{file}: tensor {name!r}: {error}; the file is damaged") from error
    begin, end = entry["data_offsets"]
    stored = Stored(_CODES[code], shape, (Extent(file, start + begin, end - begin),))
    if stored.nbytes != end - begin:
        raise RefusedError(
            f"{file}: tensor {name!r} has {end - begin} bytes, its shape needs {stored.nbytes};"
            " the file is damaged"
        )
    return stored


def _check_contiguous(file: str, tensors: Mapping[str, Stored], start: int, size: int) -> None:
    position = start
    for name, stored in tensors.items():
        (extent,) = stored.extents
        if extent.offset != position:
            raise RefusedError(
                f"{file}: tensor {name!r} overlaps another or follows a gap; the file is damaged"
            )
        position += extent.nbytes
    if position != size:
        raise RefusedError(
            f"{file}: has {size} bytes, its header needs {position}; the file is truncated or "
            f"damaged"
        )


FORMAT = FlatFormat(
    name="safetensors",
    suffixes=(".safetensors",),
    entries=read,
    structure=lambda path, offset: "the header, in JSON",
    frame=frame,
)
