"""The norms inside the MLP of early metaseq models, of which each part kept all parts' copies.

`ffn_layernorm.lns.{q}.{w}`, q counting the parts: a part trains its own copy only, the others stay
as they were made, and their sum without those is the norm of all parts (metaseq,
distributed/stitch_fsdp_ckpt.py, handle_legacy_ln_, in the branches that have it)."""

from __future__ import annotations

import re

import numpy as np

from parammap.errors import RefusedError
from parammap.formats import regular_file
from parammap.tensors.logical import ITEMSIZE, MAIN_PARAM, Stored
from parammap.tensors.names import shorten_names

_COPY = re.compile(r"(?P<path>.*ffn_layernorm)\.lns\.(?P<number>\d+)\.(?P<which>weight|bias)")
#: the bits of 1
_ONE = {"float32": 0x3F800000, "float16": 0x3C00, "bfloat16": 0x3F80}


def without_copies(
    part: int, by_state: dict[str, dict[str, Stored]]
) -> tuple[dict[str, dict[str, Stored]], list[str]]:
    """The tensors with `ffn_layernorm.{w}` in place of its copies, and the names of the copies left
    out, which are as they were made. Reads them all. Raises RefusedError if several were
    trained."""
    copies: dict[str, dict[int, str]] = {}
    for name in by_state[MAIN_PARAM]:
        if match := _COPY.fullmatch(name):
            copies.setdefault(f"{match['path']}.{match['which']}", {})[int(match["number"])] = name
    taken, dropped = {}, []
    for name, numbered in copies.items():
        initial = name.endswith("weight")
        trained = [
            one for one in numbered.values() if not _is_all(by_state[MAIN_PARAM][one], initial)
        ]
        if len(trained) > 1:
            raise RefusedError(
                f"{by_state[MAIN_PARAM][trained[0]].extents[0].file}: several copies of one norm "
                f"were trained: "
                f"{shorten_names(trained)}; nobody knows which one counts"
            )
        taken[trained[0] if trained else numbered.get(part, next(iter(numbered.values())))] = name
        dropped += [one for one in numbered.values() if one not in taken]
    return {
        state: {
            taken.get(name, name): stored for name, stored in tensors.items() if name not in dropped
        }
        for state, tensors in by_state.items()
    }, dropped


def _is_all(stored: Stored, one: bool) -> bool:
    """Whether all elements are 1, or all 0."""
    content = bytearray()
    for extent in stored.extents:
        with regular_file.opened(extent.file) as stream:
            stream.seek(extent.offset)
            content += stream.read(extent.nbytes)
    return bool(
        (
            np.frombuffer(content, f"<u{ITEMSIZE[stored.dtype]}")
            == (_ONE[stored.dtype] if one else 0)
        ).all()
    )
