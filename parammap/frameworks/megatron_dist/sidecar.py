"""The sidecar of a torch_dist checkpoint: where it lies, what it says of the whole model, and which
saves it convicts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from parammap import families
from parammap.checkpoint import sidecar as sidecars
from parammap.checkpoint.index import NameResolver, StoredTensor, TensorEntry
from parammap.checkpoint.sidecar import Buffer, RankSidecar, Sidecar, Slot
from parammap.errors import RefusedError
from parammap.frameworks.megatron import registration
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import MAIN_PARAM, Stored
from parammap.tensors.names import shorten_names

#: the releases that save the optimizer's state of buckets after a padded one from wrong positions
#: (NVIDIA/Megatron-LM#5077)
_SHIFTED = (0, 15), (0, 20)


def find(folder: Path, number: int, given: Path | None) -> Sidecar | None:
    """The sidecar of iteration `number`: in the folder given, or in the save root's
    `param_map/iter_NNNNNNN/` or, if it is the latest, `param_map/`. Raises RefusedError if the
    folder given has none of this iteration."""
    root = folder.parent / "param_map"
    for candidate in [given] if given else [root / folder.name, folder / "param_map", root]:
        found = sidecars.read(candidate)
        if found is not None and found.complete and found.iteration == number:
            return found
    if given:
        raise RefusedError(
            f"{given}: no layout_*.json of iteration {number} here; name the folder that has them"
        )
    return None


def known_layout(layout: dict[str, Any] | None) -> dict[str, Any]:
    """A layout file's content; a sidecar that `find` has found has one of every rank."""
    assert layout is not None
    return layout


def of_run(naming: NameResolver, trained: Layout, sidecar: Sidecar, experts: int) -> NameResolver:
    """What names the run's own tensors; `naming` is of the model in one rank, `experts` is how many
    a layer has."""
    layers = {
        (pp, chunk["vpp"]): chunk["layers"]
        for (_, pp, _), rank in sidecar.ranks.items()
        for chunk in known_layout(rank.layout)["chunks"]
    }
    return replace(
        naming, layout=trained, layers=layers, experts_per_rank=experts // trained.ep or None
    )


def check_positions(sidecar: Sidecar, folder: Path) -> None:
    """Refuse what core 0.15 to 0.19 saved from wrong positions: fully_reshardable, several buckets,
    the first ones padded.

    Such a release takes positions in the padded buffer for positions in the unpadded buckets back
    to back, so that as many elements as there is padding are in no file."""
    layout = known_layout(sidecar.any_layout())
    if layout["checkpoint_format"] != "torch_dist":
        return  # it came along with what ParamMap wrote, from the right positions
    release = layout["framework"]["core_version"]
    shifted = {
        slot.name
        for rank in sidecar.ranks.values()
        for buffers in rank.optimizers
        for buffer in buffers or ()
        for slot in buffer.slots
        if _padding_before(buffer, slot)
    }
    if shifted and _SHIFTED[0] <= tuple(map(int, release.split(".")[:2])) < _SHIFTED[1]:
        raise RefusedError(
            f"{folder}: megatron-core {release} saved the optimizer state of {len(shifted)} "
            "parameters from wrong positions, because their buckets follow padded ones "
            f"(NVIDIA/Megatron-LM#5077): {shorten_names(shifted)}; convert --weights-only, or save "
            "again with --ckpt-format torch or one large bucket"
        )


def _padding_before(buffer: Buffer, slot: Slot) -> int:
    return sum(
        bucket.end - bucket.start - bucket.numel_unpadded
        for bucket in (buffer.buckets or ())[: slot.bucket]
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """A parameter of the whole model, and the buffer it lies in: of which optimizer, and of which
    dtypes."""

    slot: Slot
    link: int
    dtypes: tuple[str | None, str | None]


def in_one_rank(
    sidecar: Sidecar, naming: NameResolver, wholes: list[StoredTensor], ep_experts: int
) -> Sidecar:
    """The sidecar as one rank that holds all of `wholes` would write it, without buckets; `naming`
    is the run's."""
    shapes = {whole.canonical: whole.found.stored.shape for whole in wholes}
    seen: dict[str, _Seen] = {}
    sequences: list[list[str]] = []
    for (tp, pp, ep), rank in sidecar.ranks.items():
        for link, buffers in enumerate(rank.optimizers):
            for buffer in buffers or ():
                sequences.append([])
                for slot in registration.slots_of(buffer):
                    held = naming.hold(
                        TensorEntry(
                            slot.name,
                            Place(tp, pp, ep, buffer.chunk),
                            MAIN_PARAM,
                            Stored("float32", slot.shape, ()),
                            slot.partition,
                        )
                    )
                    if held.canonical in shapes and not held.is_tied_head:
                        shape = shapes[held.canonical]
                        name = families.renumber(
                            slot.name, held.layer, _expert(slot, ep * ep_experts)
                        )
                        sequences[-1].append(name)
                        whole = replace(slot, name=name, shape=shape)
                        seen.setdefault(
                            name, _Seen(whole, link, (buffer.param_dtype, buffer.grad_dtype))
                        )
    ordered = [seen[name] for name in registration.in_order(seen, sequences)]
    links = 1 + max(one.link for one in ordered)
    optimizers = tuple(
        _buffers([one for one in ordered if one.link == link]) for link in range(links)
    )
    layout = {**known_layout(sidecar.any_layout()), "chunks": [_chunk(sidecar)]}
    return Sidecar(
        sidecar.folder,
        {(0, 0, 0): RankSidecar(optimizers, layout)},
        complete=True,
        iteration=sidecar.iteration,
    )


def _expert(slot: Slot, first: int) -> int | None:
    local = families.expert_of(slot.name)
    return None if local is None else local + first


def _buffers(seen: list[_Seen]) -> tuple[Buffer, ...]:
    """A buffer for each pair of dtypes, filled from the last parameter to the first."""
    dtypes = dict.fromkeys(one.dtypes for one in seen)
    return tuple(
        Buffer(
            0, *both, None, _laid_out([one.slot for one in reversed(seen) if one.dtypes == both])
        )
        for both in dtypes
    )


def _laid_out(slots: list[Slot]) -> tuple[Slot, ...]:
    ends = list(accumulate(math.prod(slot.shape) for slot in slots))
    return tuple(
        replace(slot, start=end - math.prod(slot.shape), end=end, bucket=0)
        for slot, end in zip(slots, ends, strict=True)
    )


def _chunk(sidecar: Sidecar) -> dict[str, Any]:
    """All layers in one chunk."""
    layers: dict[str, set[int]] = {}
    for rank in sidecar.ranks.values():
        for chunk in known_layout(rank.layout)["chunks"]:
            for path, numbers in chunk["layers"].items():
                layers.setdefault(path, set()).update(numbers)
    return {
        "vpp": 0,
        "layers": {path: sorted(numbers) for path, numbers in layers.items()},
        "pre_process": True,
        "post_process": True,
    }


def names(sidecar: Sidecar, naming: NameResolver) -> dict[str, str]:
    """The name in the model of each parameter, by canonical name, from a sidecar of one rank."""
    return {
        naming.hold(
            TensorEntry(slot.name, Place(), MAIN_PARAM, Stored("float32", slot.shape, ()))
        ).canonical: slot.name
        for buffers in sidecar.ranks[0, 0, 0].optimizers
        for buffer in buffers or ()
        for slot in buffer.slots
    }
