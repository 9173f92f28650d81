"""The optimizer of a model in a new layout: its flat buffers as the release would lay them out, as
sidecars say it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.checkpoint.cuts import dim_of
from parammap.checkpoint.index import NameResolver, TensorEntry
from parammap.checkpoint.sidecar import Buffer, RankSidecar, Sidecar, Slot
from parammap.errors import RefusedError
from parammap.families import WORD_EMBEDDING
from parammap.frameworks.megatron import before_core as megatron_before_core
from parammap.frameworks.megatron import registration
from parammap.frameworks.megatron.buckets import Rule
from parammap.frameworks.megatron.facts import Facts, grad_dtype
from parammap.frameworks.megatron.reshard.model import Entry, WholeParameter
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import MAIN_PARAM, Stored
from parammap.tensors.names import shorten_names


@dataclass(frozen=True, slots=True)
class ModelChunk:
    """A rank's model chunk in the new layout: its entries, each rank's shape of each parameter, and
    its global layers."""

    entries: list[Entry]
    shapes: dict[str, tuple[int, ...]]
    layers: range
    is_first: bool
    is_last: bool


def resharded_sidecar(
    source: Checkpoint,
    naming: NameResolver,
    facts: Facts,
    layout: Layout,
    model_facts: dict[str, Any],
    is_tied: bool,
    ranks: dict[Coordinates, list[ModelChunk]],
) -> Sidecar | None:
    """The sidecars that the hook would write for these ranks; None if the source has no optimizer
    state.

    `naming` is of the source's names in its own layout, `model_facts` a layout file's key `model`.
    Raises RefusedError where the release could not lay the buffers out."""
    if source.sidecar is None:
        return None
    stepped, tied = _stepped(source.sidecar, naming), WORD_EMBEDDING if is_tied else None
    rule = Rule.of(facts.recorded, facts.args, layout)
    if megatron_before_core.describes(source.sidecar):
        rule = replace(rule, core=megatron_before_core.CORE)
    if source.trained and not rule.experts_apart:
        _check_merged(source, list(stepped.values()))
    grads = {
        buffer.param_dtype or buffer.slots[0].dtype: grad_dtype(buffer, facts.args)
        for known in source.sidecar.ranks.values()
        for buffers in known.optimizers
        for buffer in buffers or ()
    }
    slots = {
        rank: [_slots(chunk, stepped, rule, tied) for chunk in chunks]
        for rank, chunks in ranks.items()
    }
    experts = any(slot.expert for chunks in slots.values() for own in chunks for slot in own)
    common = {
        **(facts.recorded or _UNRECORDED),
        "iteration": source.iteration,
        "checkpoint_format": "torch",
        "parallel": _parallel(layout),
        "model": model_facts,
    }
    if registration.has_own_order(source.sidecar):
        common |= registration.OWN_ORDER
    without_layers = model_facts | {key: None for key in _OF_LAYERS if key in model_facts}
    sidecars = {}
    for (tp, pp, ep), chunks in slots.items():
        chunks_of_rank = ranks[tp, pp, ep]
        try:
            optimizers = rule.optimizers(chunks, Place(tp, pp, ep), grads, experts)
        except RefusedError as error:
            raise RefusedError(f"{source.folder}: {error}") from error
        if not any(optimizers):
            continue  # all of this rank's state is saved by another one
        own = {
            **common,
            "rank": _rank(layout, tp, pp, ep),
            "model": model_facts
            if any(chunk.layers for chunk in chunks_of_rank)
            else without_layers,
            "chunks": [_described(number, chunk) for number, chunk in enumerate(chunks_of_rank)],
            "optimizers": [_optimizer(buffers, rule) for buffers in optimizers],
        }
        sidecars[tp, pp, ep] = RankSidecar(
            optimizers, None if megatron_before_core.describes(source.sidecar) else own
        )
    return Sidecar(Path(source.sidecar.folder), sidecars, complete=True, iteration=source.iteration)


def _check_merged(source: Checkpoint, stepped: list[Slot]) -> None:
    """Refuse to put experts, from buffers of their own, among parameters of which nobody knows
    whether they come first."""
    unknown = [slot.name for slot in stepped if registration.place_of(slot.name) is None]
    if unknown and any(slot.expert for slot in stepped):
        raise RefusedError(
            f"{source.folder}: nobody recorded whether its experts are registered before or after "
            f"{shorten_names(unknown)}, with which they share their buffers where ep is 1; keep ep "
            f"above 1"
        )


#: facts of the model that a rank without layers cannot tell
_OF_LAYERS = ("transformer_impl",)
#: what a layout file says of its writer, for maps of the one release that the patch which writes
#: them fits
_UNRECORDED = {
    "schema": "parammap.layout",
    "version": 1,
    "framework": {"name": "megatron", "core_version": "0.6.0", "torch_version": ""},
}


def _stepped(sidecar: Sidecar, naming: NameResolver) -> dict[str, Slot]:
    """What the source's sidecar says of each parameter, by canonical name."""
    stepped: dict[str, Slot] = {}
    for (tp, pp, ep), known in sidecar.ranks.items():
        for buffer in (buffer for buffers in known.optimizers for buffer in buffers or ()):
            for slot in buffer.slots:
                found = TensorEntry(
                    slot.name,
                    Place(tp, pp, ep, buffer.chunk),
                    MAIN_PARAM,
                    Stored("float32", slot.shape, ()),
                )
                stepped.setdefault(naming.canonical(found), slot)
    return stepped


def _slots(chunk: ModelChunk, stepped: dict[str, Slot], rule: Rule, tied: str | None) -> list[Slot]:
    """The chunk's parameters that the optimizer steps, in the order of named_parameters()."""
    return [
        _slot(
            entry,
            entry.content,
            stepped[entry.content.canonical],
            chunk.shapes[entry.name],
            rule,
            tied,
        )
        for entry in chunk.entries
        if isinstance(entry.content, WholeParameter) and entry.content.canonical in stepped
    ]


def _slot(
    entry: Entry,
    parameter: WholeParameter,
    known: Slot,
    shape: tuple[int, ...],
    rule: Rule,
    tied: str | None,
) -> Slot:
    dim = dim_of(parameter.kind)
    return replace(
        known,
        name=entry.name,
        shape=shape,
        dtype=parameter.dtype,
        start=0,
        end=math.prod(shape),
        bucket=0,
        partition_dim=dim,
        tensor_parallel=dim >= 0,
        tied=parameter.canonical == tied,
        expert=entry.is_of_experts and rule.experts_apart,
    )


def _parallel(layout: Layout) -> dict[str, Any]:
    sizes = {
        name: getattr(layout, name)
        for name in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp", "order")
    }
    return {**sizes, "world_size": layout.tp * layout.pp * layout.cp * layout.dp}


def _rank(layout: Layout, tp: int, pp: int, ep: int) -> dict[str, Any]:
    return {
        "global": layout.global_rank(tp, pp, ep),
        "tp": tp,
        "pp": pp,
        "ep": ep,
        "etp": tp % layout.etp,
    }


def _described(number: int, chunk: ModelChunk) -> dict[str, Any]:
    return {
        "vpp": number,
        "layers": {path: list(chunk.layers) for path in _paths(chunk.entries)}
        if chunk.layers
        else {},
        "pre_process": chunk.is_first,
        "post_process": chunk.is_last,
    }


def _paths(entries: Iterable[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.path for entry in entries if entry.layer is not None))


def _optimizer(buffers: tuple[Buffer, ...] | None, rule: Rule) -> dict[str, Any] | None:
    if buffers is None:
        return None
    expert = any(slot.expert for buffer in buffers for slot in buffer.slots)
    return {
        "class": "DistributedOptimizer",
        "kind": "expert" if expert else "dense",
        "data_parallel_size": rule.ranks_sharing(expert),
    }
