"""What a checkpoint's files hold, tensor by tensor: names as the files have them, shapes, dtypes
and sums of the values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from parammap.execute.checks import widen_bits
from parammap.execute.gather import Files
from parammap.formats import registry
from parammap.proof import contents
from parammap.proof.stream import BAND_BYTES
from parammap.tensors.logical import Stored
from parammap.tensors.region import whole
from parammap.tensors.shard import views_of

#: the key of a tensor of a state dict
_NAME = re.compile(r"\['([^']+)'\]")


@dataclass(frozen=True, slots=True)
class Total:
    """The sum of a tensor's finite values, in float64, and how many are not finite."""

    sum: float
    non_finite: int


def holds_tensors(file: Path) -> bool:
    """Whether a file is of a format that holds tensors, by its ending or its first bytes."""
    return registry.find(file) is not None


def entries_of(file: Path) -> list[tuple[str, Stored]]:
    """The tensors in a file: of a state dict by their names, else as `contents` has them. Raises
    RefusedError if the file is damaged or of no known format."""
    entries = contents.entries_of(file)
    named = [(name[1], stored) for key, stored in entries if (name := _NAME.fullmatch(key))]
    return named if len(named) == len(entries) else entries


def total(stored: Stored, files: Files) -> Total:
    """Reads the tensor in pieces of fixed size."""
    parts = [_total_of(bits, stored.dtype) for bits in _bits(stored, files)]
    return Total(float(sum(part.sum for part in parts)), sum(part.non_finite for part in parts))


def _bits(stored: Stored, files: Files) -> Iterator[npt.NDArray[Any]]:
    for view, _ in views_of(stored):
        for piece in whole(view.shape).pieces(view.order, BAND_BYTES // view.itemsize):
            yield files.bits(view.narrow(piece)).reshape(-1)


def _total_of(bits: npt.NDArray[Any], dtype: str) -> Total:
    values = (
        widen_bits(bits, dtype).view(np.float32) if dtype == "bfloat16" else bits.view(dtype)
    ).astype(np.float64)
    finite = np.isfinite(values)
    return Total(float(values.sum(where=finite)), int(values.size - finite.sum()))
