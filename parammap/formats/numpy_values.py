"""Numpy arrays and scalars out of pickles, where their value is needed.

`pickles` leaves them inert, so that they can be written back under the module names of the numpy
that wrote them: `numpy.core` before numpy 2, `numpy._core` from then on."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from parammap.errors import RefusedError
from parammap.formats.pickles import Global, Opaque
from parammap.tensors.arrays import Array

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_ARRAYS = {Global(module, "_reconstruct") for module in _MULTIARRAY}
_SCALARS = {Global(module, "scalar") for module in _MULTIARRAY}
_DTYPE = Global("numpy", "dtype")
_PLAIN = re.compile(r"[biufcSU]\d+")


def is_numpy(value: Any) -> bool:
    """Whether `value` is the record of an array or of a scalar."""
    return (
        isinstance(value, Opaque)
        and isinstance(value.target, Global)
        and value.target in _ARRAYS | _SCALARS
    )


def decode(record: Opaque) -> Array | np.generic:
    """The array or scalar that the record is of; source: `__reduce__` of both in numpy 1.26 and
    2.2.

    Raises RefusedError unless its dtype is a plain number, bool or text and its bytes are complete.
    """
    try:
        if record.target in _SCALARS:
            dtype, content = record.args
            scalar: np.generic = np.frombuffer(content, _dtype(dtype), count=1)[0]
            return scalar
        _, shape, dtype, fortran, content = record.state
        return (
            np.frombuffer(content, _dtype(dtype))
            .reshape(shape, order="F" if fortran else "C")
            .copy()
        )
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise RefusedError(
            f"a numpy value in a pickle cannot be decoded ({error}); save it as a tensor"
        ) from error


def _dtype(record: Opaque) -> np.dtype[Any]:
    if record.target != _DTYPE or not _PLAIN.fullmatch(record.args[0]):
        raise ValueError(f"dtype {record.args[:1]} is not plain")
    return np.dtype(record.args[0]).newbyteorder(record.state[1])
