"""Reading a tensor that is put together from a source's files into memory, without a check."""

from __future__ import annotations

from collections.abc import Iterable

from parammap.execute.checks import cast
from parammap.execute.gather import Files, array_of
from parammap.plan.plan import Fill
from parammap.tensors.arrays import Array
from parammap.tensors.logical import TensorSpec
from parammap.tensors.view import row_major


def read(spec: TensorSpec, fills: Iterable[Fill]) -> Array:
    """The bits of a tensor, as unsigned integers in the shape of `spec`, in memory of its own.

    Raises RefusedError for a file that cannot be read, or ends inside the tensor."""
    buffer = memoryview(bytearray(spec.nbytes))
    with Files() as files:
        for fill in fills:
            if fill.source is None:
                continue
            if fill.source.dtype == spec.dtype:
                files.read(fill.source, buffer, fill.target)
            else:
                bits = files.bits(fill.source, fill.target)
                array_of(buffer, fill.target)[...] = cast(bits, fill.source.dtype, spec.dtype)
    return array_of(buffer, row_major(spec.shape, spec.dtype))
