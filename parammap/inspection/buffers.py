"""The flat buffers of a distributed optimizer as plain data: their buckets, parameters, gaps and
padding.

Equal buffers of several ranks are told once; tensor-parallel ranks of one stage mostly have equal
ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from parammap import families
from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.checkpoint.sidecar import Bucket, Buffer, RankSidecar, Slot
from parammap.formats import torch_zip
from parammap.inspection.kinds import kind_of
from parammap.inspection.reading import asked

PADDED, COALESCED = "padded bucket lists", "coalesced unpadded buckets"
#: the releases of Megatron-LM's core that write each generation
RELEASES = {PADDED: "core 0.6", COALESCED: "core 0.7 and later"}
#: what ranks with equal buffers share: the stage, the numbers of the optimizer and of its buffer, the
#: optimizer's kind and data-parallel size, the buffer, its buckets, and who knows where they end
_Key = tuple[int, int, int, str | None, int | None, Buffer, tuple[Bucket, ...], str]
#: global layer numbers by (pp, chunk) and path of the layer list
_Layers = dict[tuple[int, int], dict[str, list[int]]]
_SIZES_IN_FILE = ("per_bucket_numel", "per_bucket_numel_unpadded")


@dataclass(slots=True)
class Optimizers:
    """The optimizer files of a checkpoint, by rank as the list of a chain of optimizers; none where
    its framework has no such files."""

    checkpoint: Checkpoint
    saved: dict[Coordinates, list[Any]]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Optimizers:
        """Raises RefusedError for a file that is damaged."""
        kinds = asked(checkpoint).file_kinds or {}
        names = [name for name, kind in kinds.items() if kind == "optimizer"]
        saved = {}
        for rank, folder in checkpoint.rank_folders.items():
            for path in (folder / name for name in names if (folder / name).is_file()):
                content = torch_zip.read(path)
                saved[rank] = content if isinstance(content, list) else [content]
        return cls(checkpoint, saved)

    def generation(self) -> str | None:
        """How the buckets lie in the optimizer's files; None without such files, or in a form that
        is neither."""
        links = [link for chain in self.saved.values() for link in chain if isinstance(link, dict)]
        if any("buckets_coalesced" in link for link in links):
            return COALESCED
        return PADDED if any("per_bucket_numel" in link for link in links) else None

    def buffers(self) -> list[dict[str, Any]]:
        """Each buffer once with the ranks (tp, pp, ep) that have it, by stage, optimizer and
        number; [] without a sidecar.

        Positions are elements of the padded buffer. A bucket's `gaps` lie between its parameters
        and behind the last one, its padding is [start + numel_unpadded, end). `bounds` says who
        knows where the buckets end: "layout", "file", or "map", where a bucket ends at the next
        one's first parameter and the padding of the last one is not known."""
        equal: dict[_Key, list[Coordinates]] = {}
        sidecar = self.checkpoint.sidecar
        for rank, known in sorted(
            (sidecar.ranks if sidecar else {}).items(), key=lambda item: (item[0][1], item[0])
        ):
            for number, buffers in enumerate(known.optimizers):
                for gbuf, buffer in enumerate(buffers or ()):
                    buckets = self._buckets(rank, number, gbuf, buffer)
                    key = rank[1], number, gbuf, *_facts(known, number), buffer, *buckets
                    equal.setdefault(key, []).append(rank)
        layers = self._layers()
        return [self._told(key, ranks, layers) for key, ranks in equal.items()]

    def _buckets(
        self, rank: Coordinates, number: int, gbuf: int, buffer: Buffer
    ) -> tuple[tuple[Bucket, ...], str]:
        if buffer.buckets is not None:
            return buffer.buckets, "layout"
        chain = self.saved.get(rank, [])
        saved = chain[number] if number < len(chain) else None
        if isinstance(saved, dict) and "per_bucket_numel" in saved:
            (padded,), (unpadded,) = (saved[key][gbuf].values() for key in _SIZES_IN_FILE)
            return tuple(
                Bucket(end - size, end, used)
                for end, size, used in zip(accumulate(padded), padded, unpadded, strict=True)
            ), "file"
        return _bounds_by_slots(buffer.slots), "map"

    def _layers(self) -> _Layers:
        """Global layer numbers by (pp, chunk), path of the layer list and local number, as far as
        they are known."""
        known: _Layers = {}
        for (_, pp, _), rank in (
            self.checkpoint.sidecar.ranks.items() if self.checkpoint.sidecar else ()
        ):
            for chunk in rank.layout["chunks"] if rank.layout else ():
                known[pp, chunk["vpp"]] = chunk["layers"]
        if known or not asked(self.checkpoint).as_trained:
            return known
        numbers: dict[tuple[int, int], dict[str, dict[int, int]]] = {}
        for held in self.checkpoint.index.held:
            local = families.layer_of(held.found.name)
            if local and held.layer is not None:
                at = held.found.place.pp, held.found.place.vpp
                numbers.setdefault(at, {}).setdefault(local[0], {})[local[1]] = held.layer
        return {
            at: {
                path: [layers[local] for local in sorted(layers)] for path, layers in paths.items()
            }
            for at, paths in numbers.items()
        }

    def _told(self, key: _Key, ranks: list[Coordinates], layers: _Layers) -> dict[str, Any]:
        pp, number, gbuf, kind, shards, buffer, buckets, bounds = key
        by_bucket: dict[int, list[Slot]] = {}
        for slot in sorted(buffer.slots, key=lambda slot: slot.start):
            by_bucket.setdefault(slot.bucket if len(buckets) > 1 else 0, []).append(slot)
        paths = layers.get((pp, buffer.chunk), {})
        told = [
            _bucket(bucket, by_bucket.get(position, []), paths)
            for position, bucket in enumerate(buckets)
        ]
        return {
            "pp": pp,
            "chunk": buffer.chunk,
            "optimizer": number,
            "kind": kind,
            "buffer": gbuf,
            "param_dtype": buffer.param_dtype or buffer.slots[0].dtype,
            "data_parallel_size": shards,
            "bounds": bounds,
            "ranks": [list(rank) for rank in ranks],
            "numel": max(bucket.end for bucket in buckets),
            "parameters": len(buffer.slots),
            "gaps": sum(end - start for bucket in told for start, end in bucket["gaps"]),
            "padding": sum(b.end - b.start - b.numel_unpadded for b in buckets),
            "buckets": told,
        }


def _facts(known: RankSidecar, number: int) -> tuple[str | None, int | None]:
    """The kind of an optimizer, and over how many data-parallel ranks each of its buckets is
    spread."""
    entry = known.layout["optimizers"][number] if known.layout else {}
    return entry.get("kind"), entry.get("data_parallel_size")


def _bounds_by_slots(slots: tuple[Slot, ...]) -> tuple[Bucket, ...]:
    """Buckets by a bare map alone."""
    used: dict[int, tuple[int, int]] = {}
    for slot in slots:
        start, end = used.get(slot.bucket, (slot.start, slot.end))
        used[slot.bucket] = min(start, slot.start), max(end, slot.end)
    runs = sorted(used.values())
    ends = [start for start, _ in runs[1:]] + [end for _, end in runs[-1:]]
    return tuple(
        Bucket(start, bound, end - start) for (start, end), bound in zip(runs, ends, strict=True)
    )


def _bucket(bucket: Bucket, slots: list[Slot], paths: dict[str, list[int]]) -> dict[str, Any]:
    gaps, position = [], bucket.start
    for slot in slots:
        if slot.start > position:
            gaps.append([position, slot.start])
        position = max(position, slot.end)
    used = bucket.start + bucket.numel_unpadded
    if used > position:
        gaps.append([position, used])
    return {
        "start": bucket.start,
        "end": bucket.end,
        "numel_unpadded": bucket.numel_unpadded,
        "params": [_parameter(slot, paths) for slot in slots],
        "gaps": gaps,
    }


def _parameter(slot: Slot, paths: dict[str, list[int]]) -> dict[str, Any]:
    local = families.layer_of(slot.name)
    numbers = paths.get(local[0], []) if local else []
    return {
        "name": slot.name,
        "layer": numbers[local[1]] if local and local[1] < len(numbers) else None,
        "kind": kind_of(slot.name),
        "shape": list(slot.shape),
        "dtype": slot.dtype,
        "start": slot.start,
        "end": slot.end,
    }
