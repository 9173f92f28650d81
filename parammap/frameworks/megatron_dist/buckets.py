"""The distributed optimizer's buckets in format torch_dist: tensors of flat elements that only a
sidecar can name.

`optimizer.distributed.dp_group_idx_D.gbuf_idx_G.dtype_T.bucket_idx_B.STATE` holds the unpadded
elements of bucket B of buffer G (Megatron-LM, core/optimizer/distrib_optimizer.py,
sharded_param_state_dp_reshardable of core 0.15 on, and sharded_param_state_fs_bucket_space before).
D numbers the groups of data-parallel ranks: the optimizer's place by pipeline, expert and tensor
rank; the layout file records it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from parammap.checkpoint.index import NameResolver, StoredTensor, TensorEntry
from parammap.checkpoint.sidecar import Buffer, Sidecar, Slot
from parammap.errors import RefusedError
from parammap.formats.torch_dist import Chunked, Contents
from parammap.frameworks.megatron_dist.sidecar import known_layout
from parammap.tensors.layout import Place
from parammap.tensors.logical import ITEMSIZE, MAIN_PARAM, Extent, Stored

_BUCKET = re.compile(
    r"(?:chained_(?P<link>\d+)\.)?optimizer\.distributed\.dp_group_idx_(?P<group>\d+)\."
    r"gbuf_idx_(?P<gbuf>\d+)\.dtype_.+\.bucket_idx_(?P<bucket>\d+)\.(?P<state>\w+)"
)
_STATES = {"param": MAIN_PARAM}

#: state: bucket: its tensor
_Buffer = dict[str, dict[int, Chunked]]


def are_in(contents: Contents) -> bool:
    return any(_BUCKET.fullmatch(key) for key in contents.tensors)


def states(contents: Contents, sidecar: Sidecar, naming: NameResolver) -> Iterator[StoredTensor]:
    """What the buckets hold; `naming` is of the run's own ranks. Raises RefusedError where the
    sidecar does not fit."""
    buckets = _buckets(contents)
    for (tp, pp, ep), rank in sidecar.ranks.items():
        for link, (entry, buffers) in enumerate(
            zip(known_layout(rank.layout)["optimizers"], rank.optimizers, strict=True)
        ):
            for gbuf, buffer in enumerate(buffers or ()):
                group = entry.get("data_parallel_group_idx")
                found = buckets.get((link, group, gbuf))
                if found is None:
                    raise RefusedError(
                        f"{contents.folder}: lacks buffer {gbuf} of optimizer {link}, group "
                        f"{group}, which {sidecar.folder} maps; they are of different runs"
                    )
                yield from _buffer(
                    found, buffer, Place(tp, pp, ep, buffer.chunk), naming, sidecar.folder
                )


def _buckets(contents: Contents) -> dict[tuple[int, int, int], _Buffer]:
    """By the optimizer's number in its chain, its data-parallel group and the buffer's number."""
    buckets: dict[tuple[int, int, int], _Buffer] = {}
    for key, tensor in contents.tensors.items():
        if match := _BUCKET.fullmatch(key):
            states = buckets.setdefault(
                (int(match["link"] or 0), int(match["group"]), int(match["gbuf"])), {}
            )
            states.setdefault(match["state"], {})[int(match["bucket"])] = tensor
    return buckets


def _buffer(
    found: _Buffer, buffer: Buffer, place: Place, naming: NameResolver, folder: Path
) -> Iterator[StoredTensor]:
    buckets = buffer.buckets or ()
    unpadded = {number: bucket.numel_unpadded for number, bucket in enumerate(buckets)}
    for state, tensors in found.items():
        if {number: tensor.shape for number, tensor in tensors.items()} != {
            n: (numel,) for n, numel in unpadded.items()
        }:
            raise RefusedError(
                f"{folder}: maps other buckets than {next(iter(tensors.values())).key} has; "
                "they are of different runs"
            )
        extents = {number: _extents(tensor) for number, tensor in tensors.items()}
        for slot in buffer.slots:
            start = buckets[slot.bucket].start
            stored = _slice(tensors[slot.bucket], extents[slot.bucket], slot, start)
            yield naming.hold(
                TensorEntry(slot.name, place, _STATES.get(state, state), stored, slot.partition)
            )


def _extents(tensor: Chunked) -> list[tuple[int, int, Extent]]:
    """First and last element of each chunk, and where it lies."""
    return sorted(
        (
            (chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0], tensor.read(chunk).extents[0])
            for chunk in tensor.chunks
        ),
        key=lambda run: run[:2],
    )


def _slice(
    tensor: Chunked, extents: list[tuple[int, int, Extent]], slot: Slot, origin: int
) -> Stored:
    itemsize, start, end = ITEMSIZE[tensor.dtype], slot.start - origin, slot.end - origin
    parts = [
        Extent(
            extent.file,
            extent.offset + (max(start, low) - low) * itemsize,
            (min(end, high) - max(start, low)) * itemsize,
        )
        for low, high, extent in extents
        if max(start, low) < min(end, high)
    ]
    stored = Stored(tensor.dtype, slot.shape, tuple(parts))
    if sum(part.nbytes for part in parts) != stored.nbytes:
        raise RefusedError(
            f"{parts[0].file if parts else tensor.key}: the chunks of {tensor.key} leave out a "
            f"part of {slot.name}; copy the whole checkpoint"
        )
    return stored
