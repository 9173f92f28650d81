"""The order in which Megatron-LM's GPT registers its parameters, that of named_parameters(): it
fills buffers from its end.

The hook has recorded it in the sidecar, buffer by buffer. Between buffers, and without a record,
torch's rule counts: first a module's own parameters, then its children in the order in which
__init__ makes them, which `_SIBLINGS` lists. The order of keys in a file of format torch_dist says
nothing: a save that is parallel over data-parallel ranks scatters them.

Sources: Megatron-LM core_r0.6.0 to core_r0.19.0 and main, core/models/gpt/gpt_model.py,
core/transformer/attention.py, multi_latent_attention.py, mlp.py, transformer_layer.py,
transformer_block.py, core/transformer/moe/moe_layer.py, router.py, shared_experts.py, experts.py,
legacy/model/language_model.py, transformer.py; Transformer Engine, pytorch/module/
layernorm_linear.py."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any

from parammap import families
from parammap.checkpoint.sidecar import Buffer, Sidecar, Slot
from parammap.errors import RefusedError

#: what a module may hold, parameters and modules; those of one module are registered in this order
_SIBLINGS = {
    name: number
    for number, name in enumerate(
        (
            "layer_norm_weight",
            "layer_norm_bias",
            "weight",
            "bias",
            "expert_bias",
            "gate_weight",
            "softmax_offset",
            "language_model",
            "embedding",
            "word_embeddings",
            "position_embeddings",
            "tokentype_embeddings",
            "encoder",
            "decoder",
            "layers",
            "input_norm",
            "input_layernorm",
            "self_attention",
            "query_key_value",
            "core_attention",
            "dense",
            "linear_proj",
            "linear_qkv",
            "linear_q_proj",
            "linear_q_down_proj",
            "linear_q_up_proj",
            "linear_kv_down_proj",
            "linear_kv_up_proj",
            "q_layernorm",
            "k_layernorm",
            "kv_layernorm",
            "post_attention_norm",
            "post_attention_layernorm",
            "pre_mlp_layernorm",
            "mlp",
            "router",
            "fc1_latent_proj",
            "fc2_latent_proj",
            "experts",
            "local_experts",
            "shared_experts",
            "dense_h_to_4h",
            "dense_4h_to_h",
            "linear_fc1",
            "linear_fc2",
            "final_norm",
            "final_layernorm",
            "pooler",
            "output_layer",
            "word_embeddings_for_head",
        )
    )
}
_NUMBERED = re.compile(r"(weight)?(\d+)")
#: the layer number that stands for what comes before, or behind, all layers
_BEFORE, _BEHIND = -1.0, math.inf

#: of each part of a parameter's path, its number among its siblings, and in its list
Place = tuple[tuple[int, int], ...]


@lru_cache(maxsize=1 << 16)
def place_of(name: str) -> Place | None:
    """What parameters are sorted by to come in the order of the rule; None for one that it does not
    know."""
    places = []
    for part in name.split("."):
        numbered = _NUMBERED.fullmatch(part)
        if part in _SIBLINGS:
            places.append((_SIBLINGS[part], -1))
        elif numbered:
            places.append((_SIBLINGS.get(numbered[1], -1), int(numbered[2])))
        else:
            return None
    return tuple(places)


def slots_of(buffer: Buffer) -> list[Slot]:
    """A buffer's parameters in the order in which they were registered."""
    return sorted(buffer.slots, key=lambda slot: slot.start)[
        ::-1
    ]  # empty ones start where the next does: no other order


def names_of(buffer: Buffer) -> list[str]:
    return [slot.name for slot in slots_of(buffer)]


def recorded(sidecar: Sidecar | None) -> list[list[str]]:
    """What a sidecar says of the order, buffer by buffer."""
    return [
        names_of(buffer)
        for rank in (sidecar.ranks.values() if sidecar else ())
        for buffers in rank.optimizers
        for buffer in buffers or ()
    ]


def in_order(names: Iterable[str], sequences: Iterable[Sequence[str]] = ()) -> list[str]:
    """The names of a model (or a chunk of it) in the order of registration: as recorded in
    `sequences`, each of which names some of them, and by the rule where these leave it open. Those
    of no known place come last in their layer."""
    runs: dict[float, list[list[str]]] = {}
    for sequence in sequences:
        for layer, run in _by_layer(sequence):
            runs.setdefault(layer, []).append(run)
    known = {name for there in runs.values() for run in there for name in run}
    others: dict[float, list[str]] = {}
    for name in dict.fromkeys(names):
        if name not in known:
            others.setdefault(_layer(name), []).append(name)
    return [
        name
        for layer in sorted({*runs, *others})
        for name in _merged(runs.get(layer, []), others.get(layer, []))
    ]


def _by_layer(sequence: Sequence[str]) -> Iterator[tuple[float, list[str]]]:
    last = max(
        (number for number, name in enumerate(sequence) if families.layer_of(name)), default=None
    )
    sides = [
        _layer(name)
        if families.layer_of(name) or last is None
        else _BEFORE
        if number < last
        else _BEHIND
        for number, name in enumerate(sequence)
    ]
    for layer, run in groupby(zip(sides, sequence, strict=True), key=lambda pair: pair[0]):
        yield layer, [name for _, name in run]


def _layer(name: str) -> float:
    layer = families.layer_of(name)
    return layer[1] if layer else _BEFORE if "embedding" in name.split(".") else _BEHIND


def _merged(runs: list[list[str]], others: list[str]) -> list[str]:
    """One sequence that holds all names and keeps the order of each run."""
    runs = [list(run) for run in dict.fromkeys(map(tuple, runs))]
    names = [*dict.fromkeys(name for run in runs for name in run), *others]
    places = {name: place for name in names if (place := place_of(name)) is not None}
    if len(places) == len(names) and not any(map(_misfit, runs)):
        return sorted(names, key=places.__getitem__)
    merged = []
    while runs := [run for run in runs if run]:
        inner = {name for run in runs for name in run[1:]}
        free = [run[0] for run in runs if run[0] not in inner] or [runs[0][0]]
        merged.append(min(free, key=_rank))
        runs = [[name for name in run if name != merged[-1]] for run in runs]
    return merged + sorted(others, key=_rank)


def _rank(name: str) -> tuple[bool, Place, str]:
    place = place_of(name)
    return place is None, place or (), name


# ------------------------------------------------------------------------------------------------------------
# whose order


def check(sidecar: Sidecar) -> None:
    """Refuse a sidecar that ParamMap made and whose buffers hold parameters in another order than
    the release's model."""
    if misfit := misplaced(sidecar):
        raise RefusedError(f"{sidecar.folder}: {misfit}")


def misplaced(sidecar: Sidecar) -> str | None:
    """What is wrong with the order of a sidecar; None where all is in order, or as a hook recorded
    it."""
    if any(is_recorded(rank.layout) for rank in sidecar.ranks.values()):
        return None
    for before, after in filter(None, map(_misfit, recorded(sidecar))):
        return (
            f"its buffers have {before} registered before {after}, and Megatron-LM's model "
            "registers it after that: an earlier ParamMap made them from a torch_dist checkpoint "
            "(see its CHANGELOG); convert that checkpoint again"
        )
    return None


def has_own_order(sidecar: Sidecar) -> bool:
    """Whether a hook recorded another order than that of the rule: the model is a changed one."""
    return any(is_recorded(rank.layout) for rank in sidecar.ranks.values()) and any(
        map(_misfit, recorded(sidecar))
    )


#: a layout file's key, and its value, where ParamMap laid buffers out in an order of a hook's that
#: is not the rule's
OWN_ORDER = {"parameter_order": "recorded"}


def is_recorded(layout: dict[str, Any] | None) -> bool:
    """Whether the order is that of a hook: bare maps and files with the numbers of groups are a
    hook's own."""
    return (
        layout is None
        or OWN_ORDER.items() <= layout.items()
        or any(
            "data_parallel_group_idx" in entry for entry in layout.get("optimizers", ()) if entry
        )
    )


def _misfit(names: Sequence[str]) -> tuple[str, str] | None:
    """The first two neighbours, of those that the rule knows, that it has in the other order."""
    known = [(place, name) for name in names if (place := place_of(name)) is not None]
    return next(((a, b) for (first, a), (second, b) in pairwise(known) if first > second), None)
