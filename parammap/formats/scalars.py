"""The value of a tensor of one element, such as a count of steps, where metadata is read."""

from __future__ import annotations

import os
import struct

from parammap.errors import RefusedError
from parammap.formats import regular_file
from parammap.tensors.logical import Stored

_FORMATS = {"float64": "<d", "float32": "<f", "int64": "<q", "int32": "<i", "bool": "<?"}


def value_of(scalar: Stored | float) -> float:
    """The one element of a tensor, read from its file; a number as it is. Raises RefusedError for a
    tensor of more elements, or of a dtype that counts nothing."""
    if not isinstance(scalar, Stored):
        return scalar
    (extent,) = scalar.extents
    if scalar.numel != 1 or scalar.dtype not in _FORMATS:
        raise RefusedError(
            f"{extent.file}: a tensor of {list(scalar.shape)} {scalar.dtype} stands where one number "
            "belongs; the file is damaged"
        )
    with regular_file.opened(extent.file) as file:
        content = os.pread(file.fileno(), extent.nbytes, extent.offset)
    value: float = struct.unpack(_FORMATS[scalar.dtype], content)[0]
    return value
