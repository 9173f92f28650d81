"""Extra states: what a layer's state dict holds beside its parameters, under torch's own name for
it.

Transformer Engine's layers keep the scaling of 8-bit training there: None or an empty tensor where
there is none, else bytes (an io.BytesIO up to TE 1, a uint8 tensor from TE 2 on). Those of
Megatron-LM's own layers are None. They are no weights: a layer that is loaded without them begins
its scaling anew. They stay where a state dict goes on as it is, and are left behind where its
tensors are cut anew.

Sources: PyTorch 2.13, torch/nn/modules/module.py (_EXTRA_STATE_KEY_SUFFIX); TransformerEngine main
(013e42f), pytorch/ops/op.py (get_extra_state, set_extra_state); Megatron-LM core_r0.12.0 … main,
core/tensor_parallel/layers.py and core/extensions/transformer_engine.py (merge_extra_states)."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from parammap.formats.pickles import Opaque
from parammap.tensors.layout import Place
from parammap.tensors.logical import Stored, TensorSpec

#: the last part of such a name
KEY = "_extra_state"
#: what torch.save makes of None: a pickle of protocol 2
_NONE = b"\x80\x02N."


def is_one(name: str) -> bool:
    return name.endswith(KEY)


@dataclass(frozen=True, slots=True)
class ExtraState:
    name: str
    place: Place
    value: object

    def __str__(self) -> str:
        return f"{self.name} of {self.place}"


def filled(structures: dict[tuple[int, int, int], list[dict[str, Any]]]) -> list[ExtraState]:
    """The extra states that hold anything, in the state dicts of a checkpoint's ranks and
    chunks."""
    return [
        ExtraState(name, Place(tp, pp, ep, number), value)
        for (tp, pp, ep), chunks in structures.items()
        for number, tree in enumerate(chunks)
        for name, value in _all(tree)
        if holds_anything(value)
    ]


def holds_anything(value: object) -> bool:
    if isinstance(value, Stored):
        return value.numel > 0
    if isinstance(value, Opaque) and value.state and isinstance(value.state[0], bytes):
        return not _is_none(value.state[0])
    return value is not None


def _all(tree: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if is_one(prefix) and not isinstance(tree, TensorSpec):
        yield prefix, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _all(value, f"{prefix}.{key}" if prefix else str(key))


def _is_none(content: bytes) -> bool:
    """Whether the content of an io.BytesIO is None, saved by torch (TE 1, without 8-bit
    training)."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(
                info.file_size == len(_NONE) and archive.read(info) == _NONE
                for info in archive.infolist()
                if info.filename.endswith("/data.pkl")
            )
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, ValueError, EOFError):
        return False
