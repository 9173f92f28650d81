"""Whether a checkpoint has all that its own model must have: no tensor of it may go missing in silence.

Readers compare with what their framework records of each parameter (sidecars, param_shapes, shard metadata). What is left to
judge is the model itself: layers are of a few kinds, and a layer that has a part of what another has is none of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import families
from .checkpoint import Checkpoint
from .errors import RefusedError
from .naming import brief
from .tensors import EXP_AVG, EXP_AVG_SQ, MODEL_WEIGHT, WEIGHT

#: the list of the layers that a family knows
_KNOWN = "layers"
_WEIGHT, _BIAS = ".weight", ".bias"
#: canonical names within a layer of which each has its meaning only with the others
_TOGETHER = [
    {"attention.qkv.weight", "attention.out.weight"},
    {"attention.q.weight", "attention.k.weight", "attention.v.weight", "attention.out.weight"},
    {"attention.qk.weight", "attention.filter.conv1.weight", "attention.filter.conv2.weight", "attention.filter.norm.weight",
     "attention.v.weight", "attention.out.weight"},
    {"mlp.fc1.weight", "mlp.fc2.weight"}, {"mlp.gate.weight", "mlp.up.weight", "mlp.fc2.weight"},
    {"mlp.fc1.bias", "mlp.fc2.bias"},
    {"mlp.experts.0.fc1.weight", "mlp.experts.0.fc2.weight"}, {"mlp.experts.grouped.fc1", "mlp.experts.grouped.fc2"},
    {"mlp.shared_experts.fc1.weight", "mlp.shared_experts.fc2.weight"},
    {"input_norm.bias", "post_attention_norm.bias"},
]
#: what tells that a layer has attention and an MLP, each behind its norm
_ATTENTION, _MLP = "attention.out.weight", {"mlp.fc2.weight", "mlp.router.weight"}
_NORMS = {"input_norm.weight", "post_attention_norm.weight"}


def check(source: Checkpoint) -> None:
    """Refuse a checkpoint that lacks tensors or states."""
    there = _names(source)
    weights = there.get(WEIGHT, set()) | there.get(MODEL_WEIGHT, set())
    lacking = dict.fromkeys([*_of_layers(source), *_of_model(weights), *_of_pairs(weights), *_of_states(there)])
    if lacking:
        raise RefusedError(f"{source.folder}: {len(lacking)} tensors are missing: {brief(lacking)}; copy the whole "
                           "checkpoint")


def _names(source: Checkpoint) -> dict[str, set[str]]:
    """The fused canonical names by role, without the place that those of unknown arrangement have behind them."""
    there: dict[str, set[str]] = {}
    for held in source.index.held:
        there.setdefault(held.found.role, set()).add(held.canonical.partition(" ")[0])
    return there


def _layers(source: Checkpoint) -> dict[str, dict[int, set[str]]]:
    """What each layer has, experts counted once, by the path of the list that it is in and its number. Tensors that no
    family knows are of the layers of those that one knows, if the checkpoint's names have them in the same list."""
    held = [one for one in source.index.held if one.found.role in (WEIGHT, MODEL_WEIGHT) and one.layer is not None]
    known = {path: _KNOWN for one in held if one.row and (path := _path(one.found.name))}
    lists: dict[str, dict[int, set[str]]] = {}
    for one in held:
        canonical = one.canonical.partition(" ")[0]
        path, number = families.layer_of(canonical)
        path = path if one.row else known.get(_path(one.found.name), path)
        name = families.renumber(canonical, None, 0).partition(f".{number}.")[2]
        lists.setdefault(path, {}).setdefault(number, set()).add(name)
    return lists


def _path(name: str) -> str | None:
    layer = families.layer_of(name)
    return layer and layer[0]


def _of_layers(source: Checkpoint) -> Iterator[str]:
    """What a layer lacks of the tensors of another one, all of whose others it has, and what belongs to others that it has;
    whole layers."""
    for path, layers in _layers(source).items():
        kinds = set(map(frozenset, layers.values()))
        for number, own in layers.items():
            larger = min((kind for kind in kinds if own < kind), key=len, default=frozenset())
            lacking = (larger - own) | (_belonging(own) if path == _KNOWN else set())
            yield from sorted(f"{path}.{number}.{name}" for name in lacking)
        if path == _KNOWN:
            yield from (f"{path}.{number}" for number in range(source.num_layers) if number not in layers)


def _belonging(own: set[str]) -> set[str]:
    """What a layer lacks of what belongs to the tensors that it has."""
    sets = [one for one in _TOGETHER if _signs(one) & own]
    if _ATTENTION in own and _MLP & own:
        sets.append(_NORMS)
    return set().union(*sets) - own


def _signs(together: set[str]) -> set[str]:
    """The names of a set that no other set has, which tell that it is the one that counts."""
    return {name for name in together if sum(name in other for other in _TOGETHER) == 1}


def _of_model(weights: set[str]) -> Iterator[str]:
    """What a model of such layers has once. OPT-350M, whose output is projected, has no last norm."""
    if not any(name.startswith("layers.") and name.endswith(_ATTENTION) for name in weights):
        return
    if families.WORD_EMBEDDING not in weights:
        yield families.WORD_EMBEDDING
    if "final_norm.weight" not in weights and "project_out.weight" not in weights:
        yield "final_norm.weight"
    if {"layers.0.input_norm.bias", "final_norm.weight"} <= weights and "final_norm.bias" not in weights:
        yield "final_norm.bias"


def _of_pairs(weights: set[str]) -> Iterator[str]:
    """The weights of which only the bias is there."""
    for name in sorted(weights):
        if name.endswith(_BIAS) and (weight := name.removesuffix(_BIAS) + _WEIGHT) not in weights:
            yield weight


def _of_states(there: dict[str, set[str]]) -> Iterator[str]:
    """The one moment of tensors that have the other, and the weights of those that have moments."""
    first, second = there.get(EXP_AVG, set()), there.get(EXP_AVG_SQ, set())
    yield from sorted(f"{name} ({EXP_AVG})" for name in second - first)
    yield from sorted(f"{name} ({EXP_AVG_SQ})" for name in first - second)
    yield from sorted(f"{name} ({WEIGHT})" for name in (first | second) - there.get(WEIGHT, set()))
