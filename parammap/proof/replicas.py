"""Replicas: what several ranks keep copies of, such as norms and biases under tensor parallelism,
has to be equal in all."""

from __future__ import annotations

import numpy as np

from parammap.checkpoint.index import Index
from parammap.execute.gather import Files
from parammap.proof.compare import Difference, Place, values
from parammap.proof.stream import in_processes, read_views
from parammap.tensors.logical import LogicalTensor
from parammap.tensors.shard import Shard, fitted


def unequal(index: Index, workers: int = 1) -> tuple[list[LogicalTensor], list[Difference]]:
    """The tensors of which ranks keep copies, and what differs, bit by bit, between the first copy
    (`a`) and each other.

    Elements count in the logical tensor. A tensor has a Difference for every rank whose copy is not
    the first one's."""
    copied = [
        tensor for tensor, regions in index.shards.items() if any(map(_copies, regions.values()))
    ]
    found = in_processes(lambda tensor: _differences(index, tensor), copied, workers)
    return copied, [difference for differences in found for difference in differences]


def _copies(shards: list[Shard]) -> list[Shard]:
    """The shards but the first, and but those that are the very bytes of it."""
    first = shards[0].view
    return [
        shard
        for shard in shards[1:]
        if (shard.view.file, shard.view.offset) != (first.file, first.offset)
    ]


def _differences(index: Index, tensor: LogicalTensor) -> list[Difference]:
    by_rank: dict[int, Difference] = {}
    with Files() as files:
        for region, shards in index.shards[tensor].items():
            copies = [shards[0], *_copies(shards)]
            for part, views in fitted(region, copies) if len(copies) > 1 else ():
                for cells, (bits, *others) in read_views(views, part, files):
                    for other, its in zip(copies[1:], others, strict=True):
                        if not np.array_equal(bits, its):
                            found = by_rank.setdefault(other.replica, Difference(tensor, tensor))
                            found.add(
                                bits != its,
                                values(bits, tensor.dtype),
                                values(its, tensor.dtype),
                                cells,
                                (_place(copies[0]), _place(other)),
                            )
    for found in by_rank.values():
        found.shorten()
    return list(by_rank.values())


def _place(shard: Shard) -> Place:
    return lambda row, col: (shard.view.file, shard.place_of(row, col))
