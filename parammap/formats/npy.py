"""Numpy's .npy files: a header of text, then one array.

Source: numpy/lib/format.py of numpy 1.26 and 2.2, whose own functions make and parse the header
here, so that a file is byte for byte what `numpy.save` of that numpy writes for the same array."""

from __future__ import annotations

import io
import math
import os
import tokenize
from collections.abc import Callable
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.lib import format as npy_format

from parammap.errors import RefusedError
from parammap.formats import regular_file
from parammap.formats.format import Format
from parammap.formats.frames import FrameBuilder, Segment
from parammap.tensors.logical import ITEMSIZE, Extent, Stored, TensorSpec, shape_of

#: shape, whether it is column-major, dtype
_Header: TypeAlias = tuple[tuple[int, ...], bool, np.dtype[Any]]

#: what can be read: version 3.0 differs in the names of fields only, which no plain array has
_HEADERS: dict[tuple[int, int], Callable[[BinaryIO], _Header]] = {
    (1, 0): npy_format.read_array_header_1_0,
    (2, 0): npy_format.read_array_header_2_0,
}
#: numpy's own limit is 10,000 characters
_MAX_HEADER_NBYTES = 1 << 14
#: what numpy raises for a header of arbitrary text, which it parses as Python
_DAMAGED = (
    ValueError,
    SyntaxError,
    tokenize.TokenError,
    TypeError,
    LookupError,
    OverflowError,
    MemoryError,
    RecursionError,
)


def frame(spec: TensorSpec) -> list[Segment]:
    """The segments of a file that holds the one tensor, row-major and little-endian.

    Raises RefusedError for bfloat16, which numpy does not have.
    """
    if spec.dtype == "bfloat16":
        raise RefusedError(f"{spec.name}: numpy has no bfloat16; choose another dtype with --dtype")
    header = io.BytesIO()
    npy_format.write_array_header_1_0(
        header, {"descr": numpy_dtype(spec.dtype).str, "fortran_order": False, "shape": spec.shape}
    )
    builder = FrameBuilder()
    builder.literal(header.getvalue())
    builder.content(0, spec, 0, spec.nbytes)
    return builder.segments()


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The little-endian numpy dtype of a dtype that numpy has."""
    return np.dtype(dtype).newbyteorder("<")


def read(path: str | os.PathLike[str]) -> Stored:
    """Where the array's bytes lie; reads the header only.

    Raises RefusedError if the file is missing, cut, no .npy file, or holds an array that is not
    row-major, little-endian and of plain numbers."""
    file = os.fspath(path)
    try:
        with regular_file.opened(file) as stream:
            head = io.BytesIO(stream.read(_MAX_HEADER_NBYTES))
            sizes, fortran, dtype = _header(head)
            shape, offset, size = shape_of(sizes), head.tell(), os.fstat(stream.fileno()).st_size
    except _DAMAGED as error:
        raise RefusedError(
            f"{file}: is no .npy file ({error}); save the array with numpy.save"
        ) from error
    if (
        dtype.name not in ITEMSIZE
        or dtype != numpy_dtype(dtype.name)
        or (fortran and min(shape, default=0) > 1)
    ):
        raise RefusedError(
            f"{file}: holds a {'column-major ' * fortran}array of {dtype.str}; save it row-major, "
            "little-endian, of plain numbers"
        )
    stored = Stored(dtype.name, shape, (Extent(file, offset, math.prod(shape) * dtype.itemsize),))
    if size != offset + stored.nbytes:
        raise RefusedError(
            f"{file}: has {size} bytes and its header says {offset + stored.nbytes}; copy it again "
            f"from "
            "its source"
        )
    return stored


def _header(stream: BinaryIO) -> _Header:
    version = npy_format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"version {version}")
    return _HEADERS[version](stream)


FORMAT = Format(
    name="npy",
    suffixes=(".npy",),
    magic=npy_format.MAGIC_PREFIX,
    entries=lambda path: {path.name: read(path)},
    structure=lambda path, offset: "the header: dtype, order and shape",
)
