"""Tray files: four magic bytes, the length of a header in JSON (8 bytes, little-endian), the
header, and the tensors' bytes in its order."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from parammap.errors import RefusedError
from parammap.formats.format import FlatFormat
from parammap.formats.frames import FrameBuilder, Segment
from parammap.tensors.logical import ITEMSIZE, Extent, Stored, TensorSpec

_MAGIC = b"tray"


def frame(tensors: Sequence[TensorSpec]) -> list[Segment]:
    header = json.dumps([(one.name, one.dtype, one.shape) for one in tensors]).encode()
    builder = FrameBuilder()
    builder.literal(_MAGIC + len(header).to_bytes(8, "little") + header)
    for number, one in enumerate(tensors):
        builder.content(number, one, 0, one.nbytes)
    return builder.segments()


def read(path: Path) -> dict[str, Stored]:
    with open(path, "rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise RefusedError(f"{path}: is no tray; check the path")
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        position = stream.tell()
    found = {}
    for name, dtype, shape in header:
        nbytes = math.prod(shape) * ITEMSIZE[dtype]
        found[name] = Stored(dtype, tuple(shape), (Extent(str(path), position, nbytes),))
        position += nbytes
    return found


FORMAT = FlatFormat(
    name="tray",
    suffixes=(".tray",),
    magic=_MAGIC,
    entries=read,
    structure=lambda path, offset: "the header of a tray",
    frame=frame,
)
