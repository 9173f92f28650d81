"""The distributed optimizer of Megatron-LM before core 0.4, whose layout follows from the model
file alone.

    distrib_optim.pt = {model chunk: {gradient dtype: {param, exp_avg, exp_avg_sq: one float32 tensor of the whole buffer}}}

The buffer holds the chunk's parameters without gaps from the last to the first, in the order of the
model's state dict, which is that of named_parameters(); its tail is padded to a multiple of dp. So
no sidecar is needed: it is made here. What it says is checked as any sidecar is: element counts
here, and each weight against the model's copy while converting.

Sources: Megatron-LM 23.06 and 23.08 and Yuan-2.0 (megatron/model/distributed.py, buffers of
DistributedDataParallel; megatron/optimizer/distrib_optimizer.py, save_parameter_state)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from parammap.checkpoint.sidecar import Bucket, Buffer, RankSidecar, Sidecar, Slot
from parammap.errors import RefusedError
from parammap.formats import torch_zip, tree_schema
from parammap.formats.pickles import Global
from parammap.frameworks.megatron.facts import args_of
from parammap.frameworks.megatron.files import OPTIMIZER_FILE, MegatronRank
from parammap.frameworks.megatron.saved import OPTIMIZER
from parammap.tensors.logical import Stored

#: the last megatron-core (major, minor) of this format
CORE = (0, 3)


def sidecar_of(folder: Path, ranks: Iterable[MegatronRank]) -> Sidecar | None:
    """The sidecar of a checkpoint whose optimizer files are of this format; None if none is.

    Raises RefusedError if some rank's file is missing, or has another number of elements than its
    model."""
    saved = {
        rank.folder / OPTIMIZER_FILE: (rank, _content(rank.folder / OPTIMIZER_FILE))
        for rank in ranks
    }
    if not any(is_this_format(content) for _, content in saved.values()):
        return None
    for path, (_, content) in saved.items():
        if not is_this_format(content):
            raise RefusedError(
                f"{path}: missing, or not of the same release as the others; copy the whole "
                "checkpoint, or convert --weights-only"
            )
    return Sidecar(
        folder,
        {
            rank.coordinates: RankSidecar((_buffers(path, content, rank),))
            for path, (rank, content) in saved.items()
        },
        complete=True,
    )


def _content(path: Path) -> Any:
    if not path.is_file():
        return None
    content = torch_zip.read(path)
    tree_schema.check(content, OPTIMIZER, path)
    return content


def is_this_format(saved: object) -> bool:
    """Whether the content of a distrib_optim.pt is of this format: later ones have other keys, or
    lists of buckets."""
    return (
        isinstance(saved, Mapping)
        and bool(saved)
        and all(
            isinstance(number, int)
            and isinstance(by_dtype, Mapping)
            and len(by_dtype) == 1
            and all(
                isinstance(dtype, Global)
                and all(isinstance(state, Stored) for state in states.values())
                for dtype, states in by_dtype.items()
            )
            for number, by_dtype in saved.items()
        )
    )


def describes(sidecar: Sidecar) -> bool:
    """Whether a sidecar was made here: it knows all, and no file of its own says so."""
    return sidecar.complete and sidecar.any_layout() is None


def saved(buffers: Mapping[int, Mapping[Any, Any]]) -> dict[int, Any]:
    """The content of distrib_optim.pt from that of core 0.6, `{buffer: {(parameter, gradient
    dtype): {state: [bucket]}}}`: a buffer is one bucket."""
    return {
        number: {gradient: {state: bucket for state, (bucket,) in states.items()}}
        for number, by_dtypes in buffers.items()
        for (_, gradient), states in by_dtypes.items()
    }


def _buffers(path: Path, saved: Mapping[int, Any], rank: MegatronRank) -> tuple[Buffer, ...]:
    chunks = rank.chunks()
    if list(saved) != list(chunks):
        raise RefusedError(
            f"{path}: holds the buffers of {len(saved)} model chunks, the model file "
            f"{len(chunks)}; they are of different runs"
        )
    dp = args_of(rank.content).get("data_parallel_size") or 1
    return tuple(
        _buffer(path, number, chunks[number], by_dtype, dp) for number, by_dtype in saved.items()
    )


def _buffer(
    path: Path, chunk: int, tensors: dict[str, Stored], by_dtype: Mapping[Any, Any], dp: int
) -> Buffer:
    slots, end = [], 0
    for name, stored in reversed(tensors.items()):
        slots.append(Slot(name, stored.shape, stored.dtype, end, end + stored.numel, 0))
        end += stored.numel
    ((dtype, states),) = by_dtype.items()
    lengths = {stored.numel for stored in states.values()}
    if len(lengths) != 1 or not lengths <= {end, -(-end // dp) * dp}:
        raise RefusedError(
            f"{path}: the states of model chunk {chunk} have "
            f"{', '.join(map(str, sorted(lengths)))} elements and the model's parameters {end}, at "
            f"dp {dp}; they are of different runs, or some parameters are not trained: convert "
            "--weights-only"
        )
    (length,) = lengths
    return Buffer(chunk, slots[0].dtype, dtype.name, (Bucket(0, length, length),), tuple(slots))
