"""How a release of megatron-core lays parameters out in the distributed optimizer's flat buffers
and buckets.

The hook records the layout of the run that saved; for another parallel layout this is the rule by
which the release would make its own. Every (chunk, parameter dtype) has a buffer, which parameters
fill from the last to the first:

| core         | a parameter starts at | a bucket ends at a multiple of          | before a tied embedding's own bucket  |
|--------------|-----------------------|-----------------------------------------|---------------------------------------|
| before 0.4   | any element           | dp; there is one bucket                 | it has none                           |
| 0.6          | any element           | dp                                      | nothing is padded                     |
| 0.7          | any element           | lcm(dp, 128)                            | nothing is padded                     |
| 0.8          | multiples of 64       | lcm(dp, 128)                            | nothing is padded                     |
| 0.9 to 0.12  | multiples of 64       | lcm(dp, 128), from 0.12 on with busbw   | padding for dp only, counted as used  |
| 0.13 to 0.20 | multiples of 64       | lcm(dp, 128), with busbw                | padded as every bucket                |
|              |                       | lcm(dp, 128, 2^16)                      |                                       |

`dp` is the number of ranks that share the buffer: with context parallel, and for experts without
expert parallel.

Sources: Megatron-LM core_r0.6.0 to core_r0.19.0 and main (0.20),
core/distributed/param_and_grad_buffer.py and distributed_data_parallel.py,
core/optimizer/distrib_optimizer.py (layout from 0.18 on) and __init__.py (chain),
training/training.py (bucket size)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from parammap.checkpoint.sidecar import Bucket, Buffer, Slot
from parammap.errors import RefusedError
from parammap.tensors.layout import Layout, Place

#: bare maps are of this release, the only one that the patch which writes them fits
_CORE_OF_MAPS = (0, 6)


@dataclass(frozen=True, slots=True)
class Rule:
    """What decides over the buffers of a run of megatron-core `core` (major, minor) in the parallel
    layout `layout`.

    `bucket_size`: elements at which a bucket closes, None without --overlap-grad-reduce;
    `num_buckets` replaces it (--ddp-num-buckets). `pad_for_busbw`:
    --ddp-pad-buckets-for-high-nccl-busbw. `first_chunk_apart`:
    --overlap-param-gather-with-optimizer-step. `instances`: --num-distributed-optimizer-instances,
    which share dp."""

    core: tuple[int, int]
    layout: Layout
    bucket_size: int | None = None
    num_buckets: int | None = None
    pad_for_busbw: bool = False
    first_chunk_apart: bool = False
    instances: int = 1

    @classmethod
    def of(cls, recorded: dict[str, Any] | None, args: dict[str, Any], layout: Layout) -> Rule:
        """The rule for `layout`, from what a run says: one of its layout files (None: maps only)
        and Megatron's args.

        `recorded["ddp"]`, where the hook wrote it, holds what the run used; the arguments of other
        runs tell the same. Where neither does, the release's defaults count: no overlap of the
        gradient reduction, so one bucket; with overlap, buckets of 40,000,000 elements (0.6) or
        max(40,000,000, 1,000,000 per data-parallel rank) (from 0.7 on). A recorded size that is the
        default of the recorded layout follows the new one. Sizes in elements."""
        recorded = recorded or {}
        ddp = recorded.get("ddp") or {}
        core = release_of(recorded)
        counts_cp = core >= (0, 12) and bool(
            args
        )  # the training script counts context parallel ranks, the core does not
        default = _default_bucket_size(core, layout.dp * (layout.cp if counts_cp else 1))
        size = args.get("ddp_bucket_size")
        if size is None and ddp.get("bucket_size"):
            was = recorded["parallel"]
            was_default = _default_bucket_size(core, was["dp"] * (was["cp"] if counts_cp else 1))
            size = None if ddp["bucket_size"] == was_default else ddp["bucket_size"]
        overlap = ddp.get("overlap_grad_reduce", args.get("overlap_grad_reduce"))
        return cls(
            core,
            layout,
            (size or default) if overlap else None,
            args.get("ddp_num_buckets") if overlap else None,
            bool(
                ddp.get(
                    "pad_buckets_for_high_nccl_busbw",
                    args.get("ddp_pad_buckets_for_high_nccl_busbw"),
                )
            ),
            bool(args.get("overlap_param_gather_with_optimizer_step")),
            args.get("num_distributed_optimizer_instances") or 1,
        )

    @property
    def experts_apart(self) -> bool:
        """Whether experts have buffers and an optimizer of their own (param.allreduce is False):
        Slot.expert says so."""
        return self.layout.ep > 1 or (self.core >= (0, 19) and self.layout.etp != self.layout.tp)

    def ranks_sharing(self, expert: bool) -> int:
        """Size of the group over which a buffer is sharded. (0.18 lays out for all instances' ranks
        together.)"""
        at = self.layout
        ranks = at.dp * at.cp * at.tp // (at.etp * at.ep) if expert else at.dp * at.cp
        return ranks if self.core == (0, 18) else ranks // self.instances

    def closing_size(self, pp: int, chunk: int, numel: int) -> int | None:
        """Elements at which a bucket closes in chunk `chunk` of stage `pp`, whose rank has `numel`
        parameters' elements.

        None where a buffer is one bucket: only the first chunk of the first stage has gradients to
        wait for."""
        if pp or chunk or self.first_chunk_apart:
            return None
        return numel // self.num_buckets if self.num_buckets else self.bucket_size

    # ---------------------------------------------------------------------------------------------------------
    # buffers

    def optimizers(
        self,
        chunks: Sequence[Sequence[Slot]],
        place: Place,
        grad_dtypes: Mapping[str, str | None],
        experts_anywhere: bool = False,
    ) -> tuple[tuple[Buffer, ...] | None, ...]:
        """The rank's optimizers as a sidecar and distrib_optim.pt have them: [dense] or [dense,
        expert].

        `chunks` holds each chunk's parameters in the order of named_parameters(); their start, end
        and bucket do not count. `grad_dtypes`: the dtype of gradients by that of parameters.
        `experts_anywhere`: some rank of the run has Slot.expert parameters, if this one has none.
        An optimizer counts the buffers of chunk 0 first, then of chunk 1 … None stands for an
        optimizer whose state another expert-parallel rank saves."""
        numel = sum(math.prod(slot.shape) for chunk in chunks for slot in chunk)

        def buffers(numbers: Sequence[int], expert: bool) -> tuple[Buffer, ...]:
            return tuple(
                buffer
                for number in numbers
                for buffer in self.buffers(
                    number,
                    [slot for slot in chunks[number] if slot.expert == expert],
                    expert,
                    grad_dtypes,
                    self.closing_size(place.pp, number, numel),
                )
            )

        every = range(len(chunks))
        dense = [
            buffers(part, False)
            for part in ((every[:1], every[1:]) if self.first_chunk_apart else (every,))
        ]
        expert = buffers(every, True)
        from_peers = experts_anywhere and self.core >= (
            0,
            14,
        )  # 0.14 on: parameter groups are those of all ranks together
        return (
            *(part if self._saves_dense(place) else None for part in dense),
            *([expert if self._saves_experts(place) else None] if expert or from_peers else []),
        )

    def buffers(
        self,
        chunk: int,
        params: Sequence[Slot],
        expert: bool,
        grad_dtypes: Mapping[str, str | None],
        closing_size: int | None,
    ) -> list[Buffer]:
        """One buffer per dtype, in the order in which named_parameters() meets them."""
        return [
            Buffer(
                chunk,
                dtype,
                grad_dtypes[dtype],
                *self._lay_out(
                    [slot for slot in params if slot.dtype == dtype], expert, closing_size
                ),
            )
            for dtype in dict.fromkeys(slot.dtype for slot in params)
        ]

    def _lay_out(
        self, params: Sequence[Slot], expert: bool, closing_size: int | None
    ) -> tuple[tuple[Bucket, ...], tuple[Slot, ...]]:
        align = 64 if self.core >= (0, 8) else 1
        slots, buckets = [], []
        first = end = 0  # of the open bucket
        for slot in reversed(params):
            start = _pad(end, align)
            alone = slot.tied and self.layout.pp > 1 and self.core >= (0, 4)
            if alone and end > first:
                start, bucket = self._close_before_tied(slot, first, start, expert)
                buckets.append(bucket)
                first = start
            end = start + math.prod(slot.shape)
            slots.append(replace(slot, start=start, end=end, bucket=len(buckets)))
            if alone or (closing_size is not None and end - first >= closing_size):
                buckets.append(self._bucket(first, end, expert))
                first = end = buckets[-1].end
        if end > first:
            buckets.append(self._bucket(first, end, expert))
        return tuple(buckets), tuple(slots)

    def _bucket(self, first: int, end: int, expert: bool) -> Bucket:
        return Bucket(first, _pad(end, self._divisor(expert)), end - first)

    def _divisor(self, expert: bool) -> int:
        """Of where buckets end."""
        ranks = self.ranks_sharing(expert)
        if self.core < (0, 7):
            return ranks
        return math.lcm(ranks, 128, 2**16) if self.pad_for_busbw else math.lcm(ranks, 128)

    def _close_before_tied(
        self, slot: Slot, first: int, start: int, expert: bool
    ) -> tuple[int, Bucket]:
        """Where the tied embedding starts that would have started at `start`, and the bucket before
        it.

        The embedding has a bucket of its own so that first and last stage shard it alike. Raises
        RefusedError where the release would stop, or have it start before its bucket (up to 0.12).
        """
        if (0, 9) <= self.core < (0, 13) and start % self.ranks_sharing(expert):
            start = _pad(start, self._divisor(expert))
        bucket = self._bucket(first, start, expert)
        if self.core < (0, 13) and bucket.end != start:
            release = ".".join(map(str, self.core))
            raise RefusedError(
                f"{slot.name}: megatron-core {release} cannot give this tied embedding its own "
                f"bucket after {start} elements, which are no multiple of {self._divisor(expert)}; "
                "choose another tp or another number of layers for the first stage, or save for "
                "core 0.13 or later"
            )
        return bucket.end, bucket

    # -------------------------------------------------------------------------------------------------------
    # who saves

    def _saves_dense(self, place: Place) -> bool:
        """Rank 0 of a tp rank's dense data-parallel group is number `tp` in its stage; expert ranks
        count etp first."""
        return place.ep == place.tp // self.layout.etp % self.layout.ep

    def _saves_experts(self, place: Place) -> bool:
        """Rank 0 of the experts' data-parallel groups are the first etp * ep ranks of the stage."""
        etp = self.layout.etp
        return place.tp in {
            rank % self.layout.tp for rank in range(place.ep * etp, (place.ep + 1) * etp)
        }


def release_of(recorded: dict[str, Any]) -> tuple[int, int]:
    """Major and minor of the megatron-core that a layout file names; without one, that of bare
    maps."""
    if not recorded:
        return _CORE_OF_MAPS
    major, minor = recorded["framework"]["core_version"].split(".")[:2]
    return int(major), int(minor)


def _default_bucket_size(core: tuple[int, int], ranks: int) -> int:
    return 40_000_000 if core < (0, 7) else max(40_000_000, 1_000_000 * ranks)


def _pad(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor
