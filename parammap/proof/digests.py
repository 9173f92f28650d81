"""The digests of logical tensors, read from disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from parammap.checkpoint.index import Index
from parammap.checkpoint.manifest import TensorDigest
from parammap.execute.checks import cast_bits, widen_bits
from parammap.execute.gather import Files
from parammap.proof.stream import copies_of, in_processes, read_views
from parammap.tensors.digest import MASK, cells_digest
from parammap.tensors.logical import LogicalTensor
from parammap.tensors.region import Region
from parammap.tensors.shard import Shard

#: bytes that a worker process is given at a time
_BATCH_BYTES = 16 << 20


def tensor_digests(index: Index, workers: int = 1) -> list[TensorDigest]:
    """The digest of every logical tensor, in the order of the files."""
    return [
        TensorDigest(
            state=tensor.state,
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            digest=f"{first:016x}",
            others=tuple(f"{one:016x}" for one in sorted({*others} - {first})),
        )
        for tensor, summed in digests(index, workers).items()
        for first, *others in [summed.digests]
    ]


@dataclass(frozen=True, slots=True)
class _Share:
    """One copy of one region of the `tensor`-th tensor, to be digested as if it were of `dtype`."""

    tensor: int
    number: int
    shard: Shard
    dtype: str | None


@dataclass(slots=True)
class Summed:
    """The digest of each copy of a tensor that ranks keep, and how many elements a cast back would
    not keep exactly."""

    digests: list[int]
    inexact: int = 0


def digests(
    index: Index,
    workers: int = 1,
    dtypes: dict[LogicalTensor, str] | None = None,
    only: Iterable[LogicalTensor] | None = None,
) -> dict[LogicalTensor, Summed]:
    """The digests of every logical tensor, or of some, read from disk; those in `dtypes` as if they
    still were of that dtype."""
    dtypes, tensors = dtypes or {}, list(index.shards if only is None else only)
    shares = [
        _Share(number, copy, shard, dtypes.get(tensor))
        for number, tensor in enumerate(tensors)
        for shards in index.shards[tensor].values()
        for copy, shard in enumerate(sorted(shards, key=lambda shard: shard.replica))
    ]
    sums: dict[tuple[int, Region, int], int] = {}
    result = {tensor: Summed([0] * copies_of(index.shards[tensor])) for tensor in tensors}
    for batch in in_processes(_digests_of, list(_batches(shares)), workers):
        for share, digest, inexact in batch:
            key = share.tensor, share.shard.region, share.number
            sums[key] = sums.get(key, 0) + digest
            result[tensors[share.tensor]].inexact += inexact
    for number, tensor in enumerate(tensors):
        for region, shards in index.shards[tensor].items():
            totals = result[tensor].digests
            for copy in range(len(totals)):
                totals[copy] = (totals[copy] + sums[number, region, copy % len(shards)]) & MASK
    return result


def _batches(shares: list[_Share]) -> Iterator[list[_Share]]:
    batch, nbytes = [], 0
    for share in shares:
        batch.append(share)
        nbytes += share.shard.region.numel * share.shard.view.itemsize
        if nbytes >= _BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _digests_of(batch: list[_Share]) -> list[tuple[_Share, int, int]]:
    with Files() as files:
        return [(share, *_digest_of(share.shard, files, share.dtype)) for share in batch]


def _digest_of(shard: Shard, files: Files, dtype: str | None) -> tuple[int, int]:
    total = inexact = 0
    for cells, (bits,) in read_views([shard.view], shard.region, files):
        if dtype is not None:
            narrow = cast_bits(bits, dtype)
            inexact += int(np.count_nonzero(widen_bits(narrow, dtype) != bits))
            bits = narrow
        total += cells_digest(bits, cells)
    return total, inexact
