"""Megatron-LM's distributed optimizer on disk: flat buffers in buckets, and the parameters the
sidecar finds in them.

Two generations of distrib_optim.pt (Megatron-LM, core/optimizer/distrib_optimizer.py):
- core 0.6: `{gbuf: {dtypes: {state: [one tensor per bucket]}}}`, buckets padded to their full length;
- core 0.7 and later: `{'buckets_coalesced': True, gbuf: {dtypes: {state: one tensor}}}`, the *unpadded* buckets back to
  back, so an element's position in the file is  start − bucket start + Σ unpadded lengths of the buckets before.
A mixture of experts saves a list of these, [dense, expert], with None where another rank holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parammap import families
from parammap.checkpoint.index import TensorEntry
from parammap.checkpoint.sidecar import Bucket, Buffer, Sidecar, Slot
from parammap.errors import RefusedError
from parammap.formats import torch_zip, tree_schema
from parammap.frameworks.megatron.files import OPTIMIZER_FILE
from parammap.frameworks.megatron.saved import OPTIMIZER
from parammap.tensors.layout import Place
from parammap.tensors.logical import ITEMSIZE, MAIN_PARAM, Extent, Stored

#: state of a state by its key in the file; the others keep their key
_STATES = {"param": MAIN_PARAM}


@dataclass(frozen=True, slots=True)
class _Run:
    """Elements [start, end) of the padded buffer that lie together on disk, from element `position`
    of `stored` on."""

    start: int
    end: int
    stored: Stored
    position: int


def read_rank(
    folder: Path, place: Place, model: list[TensorEntry], sidecar: Sidecar, drop: frozenset[str]
) -> list[TensorEntry]:
    """The optimizer's states that this rank's file holds, one Found per state and parameter.

    Raises RefusedError if the file and the sidecar contradict each other or the model's own
    tensors."""
    path = folder / OPTIMIZER_FILE
    if not path.is_file():
        raise RefusedError(f"{path}: missing; copy the whole checkpoint, or convert --weights-only")
    content = torch_zip.read(path)
    tree_schema.check(content, OPTIMIZER, path)
    chain = content if isinstance(content, list) else [content]
    known = sidecar.ranks.get((place.tp, place.pp, place.ep))
    optimizers = known.optimizers if known else ()
    shapes = {(one.place.vpp, one.name): one.stored.shape for one in model}
    found: list[TensorEntry] = []
    for number, saved in enumerate(chain):
        buffers = optimizers[number] if number < len(optimizers) else None
        if saved is None:
            continue
        if buffers is None:
            if sidecar.complete or number == 0:
                raise RefusedError(
                    f"{sidecar.folder}: says nothing of optimizer {number} at {place}, which "
                    f"{path} holds; copy that rank's files as well"
                )
            continue
        _check_count(path, saved, buffers, sidecar)
        for gbuf, buffer in enumerate(buffers):
            found += _buffer_states(
                path, place, gbuf, _states(path, saved, gbuf), buffer, shapes, sidecar
            )
    return [one for one in found if not dropped(one.name, drop)]


def dropped(name: str, drop: frozenset[str]) -> bool:
    return "experts" in drop and families.expert_of(name) is not None


def _check_count(path: Path, saved: object, buffers: tuple[Buffer, ...], sidecar: Sidecar) -> None:
    if not isinstance(saved, dict):
        raise RefusedError(
            f"{path}: holds a {type(saved).__name__} and not a distributed optimizer's buffers"
        )
    there = sum(isinstance(key, int) for key in saved)
    if there != len(buffers):
        raise RefusedError(
            f"{path}: holds {there} buffers, the sidecar in {sidecar.folder} maps {len(buffers)}; "
            "they are of different runs"
        )


def _states(path: Path, saved: dict[Any, Any], gbuf: int) -> dict[str, Any]:
    by_dtypes = saved.get(gbuf)
    if not isinstance(by_dtypes, dict) or len(by_dtypes) != 1:
        raise RefusedError(
            f"{path}: buffer {gbuf} is not of a kind that Megatron-LM core 0.6 or later saves"
        )
    ((dtypes, states),) = by_dtypes.items()
    if not (bounds := saved.get("per_bucket_numel")):
        return {**states}
    try:
        lengths = (bounds, saved["per_bucket_numel_unpadded"])
        pairs = zip(*(one[gbuf][dtypes] for one in lengths), strict=True)
        return {**states, "per_bucket": list(pairs)}
    except (LookupError, ValueError) as error:
        raise RefusedError(
            f"{path}: does not record the lengths of the buckets of buffer {gbuf} with and without "
            "padding; the file is damaged"
        ) from error


def _buffer_states(
    path: Path,
    place: Place,
    gbuf: int,
    states: dict[str, Any],
    buffer: Buffer,
    shapes: dict[tuple[int, str], tuple[int, ...]],
    sidecar: Sidecar,
) -> Iterator[TensorEntry]:
    """One Found per state and parameter of a buffer."""
    where = f"{path}: buffer {gbuf}"
    buckets = _buckets(where, states, buffer)
    _check_slots(where, buffer, buckets)
    at = Place(place.tp, place.pp, place.ep, buffer.chunk)
    tensors = {
        key: value
        for key, value in states.items()
        if isinstance(value, Stored)
        or (isinstance(value, list) and value and isinstance(value[0], Stored))
    }
    if "param" not in tensors:
        raise RefusedError(f"{where}: holds no `param` state, only {sorted(map(str, states))}")
    for key, value in tensors.items():
        runs = _runs(where, key, value, buckets)
        for slot in buffer.slots:
            expected = shapes.get((buffer.chunk, slot.name))
            if expected != slot.shape:
                raise RefusedError(
                    f"{sidecar.folder}: maps {slot.name} {list(slot.shape)} of {at}; the model "
                    f"file has {'no such tensor' if expected is None else list(expected)}; they "
                    "are of different runs"
                )
            stored = _slice(runs[_bucket_of(slot, buckets)], slot)
            yield TensorEntry(slot.name, at, _STATES.get(key, key), stored, slot.partition)


def _buckets(where: str, states: dict[str, Any], buffer: Buffer) -> tuple[Bucket, ...]:
    """The bucket bounds: the file's own (core 0.6), else the sidecar's; both must agree where both
    speak."""
    if "per_bucket" in states:
        buckets, start = [], 0
        for numel, unpadded in states["per_bucket"]:
            buckets.append(Bucket(start, start + numel, unpadded))
            start += numel
        if buffer.buckets not in (None, tuple(buckets)):
            raise RefusedError(
                f"{where}: has other buckets than the sidecar records; they are of different runs"
            )
        return tuple(buckets)
    if buffer.buckets is not None:
        return buffer.buckets
    last = max(slot.end for slot in buffer.slots)
    param = states["param"] if isinstance(states["param"], list) else [states["param"]]
    total = states.get("numel_unpadded", sum(stored.numel for stored in param))
    if last != total:
        raise RefusedError(
            f"{where}: its buckets are padded and the map does not say where; a layout file, as "
            "ParamMap's hook writes it, is needed"
        )
    return (Bucket(0, total, total),)


def _check_slots(where: str, buffer: Buffer, buckets: tuple[Bucket, ...]) -> None:
    """Parameters must be disjoint, and lie in the used part of the bucket that they name."""
    end = 0
    for slot in sorted(buffer.slots, key=lambda slot: slot.start):
        number = _bucket_of(slot, buckets)
        bucket = buckets[number] if number < len(buckets) else None
        if (
            bucket is None
            or slot.start < max(end, bucket.start)
            or slot.end > bucket.start + bucket.numel_unpadded
        ):
            raise RefusedError(
                f"{where}: {slot.name} cannot lie at elements {slot.start} to {slot.end} of bucket "
                f"{slot.bucket}; the sidecar is of another run"
            )
        end = slot.end


def _bucket_of(slot: Slot, buckets: tuple[Bucket, ...]) -> int:
    """The slot's bucket; a buffer without padding counts as one bucket, whatever the map says."""
    return slot.bucket if len(buckets) > 1 else 0


def _runs(
    where: str, key: str, value: Stored | list[Stored], buckets: tuple[Bucket, ...]
) -> list[_Run]:
    """Where each bucket lies on disk."""
    if isinstance(value, list):
        lengths = [stored.numel for stored in value]
        expected = [bucket.end - bucket.start for bucket in buckets]
        if lengths != expected:
            raise RefusedError(
                f"{where}: its {key} buckets are {lengths} elements long and not {expected}; "
                "the sidecar is of another run"
            )
        return [
            _Run(bucket.start, bucket.end, stored, 0)
            for bucket, stored in zip(buckets, value, strict=True)
        ]
    runs, position = [], 0
    for bucket in buckets:
        runs.append(_Run(bucket.start, bucket.start + bucket.numel_unpadded, value, position))
        position += bucket.numel_unpadded
    if position != value.numel:
        raise RefusedError(
            f"{where}: {key} has {value.numel} elements and the sidecar's buckets {position}; "
            "they are of different runs"
        )
    return runs


def _slice(run: _Run, slot: Slot) -> Stored:
    (extent,) = run.stored.extents
    itemsize = ITEMSIZE[run.stored.dtype]
    offset = extent.offset + (run.position + slot.start - run.start) * itemsize
    return Stored(
        run.stored.dtype,
        slot.shape,
        (Extent(extent.file, offset, (slot.end - slot.start) * itemsize),),
    )
