"""Whether a checkpoint has all that its own model must have: no tensor of it may go missing in
silence.

Readers compare with what their framework records of each parameter (sidecars, param_shapes, shard
metadata). What is left to judge here is the model itself, as far as a family knows its tensors:
layers are of a few kinds, and one that has a part of what another one has is none of them. A whole
attention or a whole MLP may be left out of a layer: such models exist."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from parammap import families
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, MAIN_PARAM, MODEL_PARAM
from parammap.tensors.names import shorten_names

#: what a family's canonical names of layers begin with
_LAYERS = "layers."
_WEIGHT, _BIAS = ".weight", ".bias"
#: what tells that a layer has attention and an MLP, each behind its norm
_ATTENTION, _MLP = "attention.out.weight", {"mlp.fc2.weight", "mlp.router.weight"}
_NORMS = frozenset({"input_norm.weight", "post_attention_norm.weight"})
#: the halves of a layer, each of which a layer may be without
_HALVES = (("attention.", "input_norm."), ("mlp.", "post_attention_norm."))


def check(source: Checkpoint) -> None:
    """Refuse a checkpoint that lacks tensors or states."""
    if lacking := missing(source):
        raise RefusedError(
            f"{source.folder}: {len(lacking)} tensors are missing: {shorten_names(lacking)}; copy "
            "the whole checkpoint"
        )


def missing(source: Checkpoint, *, whole_layers: bool = False) -> list[str]:
    """The canonical names that the model lacks, with the state where that is all that is lacking.
    `whole_layers`: as a model whose layers all have an attention and an MLP, between an embedding
    and a last norm."""
    known = {
        held.canonical
        for held in source.index.held
        if held.row and held.found.state in (MAIN_PARAM, MODEL_PARAM)
    }
    strange = {held.layer for held in source.index.held if not held.row}
    layers: dict[int, set[str]] = {}
    for name in known:
        if name.startswith(_LAYERS):
            number, _, local = families.renumber(name, None, 0).removeprefix(_LAYERS).partition(".")
            layers.setdefault(int(number), set()).add(local)
    lacking = [
        *_of_layers(source, layers, known, strange),
        *(_of_halves(source, layers) if whole_layers else ()),
        *_of_model(source, known, whole_layers),
        *_of_pairs(source, known, strange),
        *_of_states(source),
    ]
    return list(dict.fromkeys(lacking))


def _of_layers(
    source: Checkpoint, layers: dict[int, set[str]], known: set[str], strange: set[int | None]
) -> Iterator[str]:
    """What a layer lacks of the tensors of another one, all of whose others it has, and what
    belongs to others that it has; whole layers. A layer with tensors that no family knows may have
    any."""
    kinds, has_norms = set(map(frozenset, layers.values())), _has_norms(known)
    together = _by_telling_name()
    for number, own in sorted(layers.items()):
        if number in strange:
            continue
        larger = min((kind for kind in kinds if own < kind), key=len, default=frozenset())
        lacking = _halves_begun(own, larger - own) | _belonging(own, together, has_norms)
        yield from sorted(f"{_LAYERS}{number}.{name}" for name in lacking)
    if layers:
        there = {held.layer for held in source.index.held}
        yield from (
            f"{_LAYERS}{number}" for number in range(source.num_layers) if number not in there
        )


def _of_halves(source: Checkpoint, layers: dict[int, set[str]]) -> Iterator[str]:
    """The attention or the MLP that a layer is without, as one."""
    for number in range(source.num_layers):
        for part, _ in _HALVES:
            if not any(name.startswith(part) for name in layers.get(number, ())):
                yield f"{_LAYERS}{number}.{part.rstrip('.')}"


def _halves_begun(own: set[str], lacking: frozenset[str]) -> set[str]:
    """What is lacking, without the halves of a layer of which it has nothing at all."""
    left_out = tuple(
        name for half in _HALVES if not any(one.startswith(half) for one in own) for name in half
    )
    return {name for name in lacking if not name.startswith(left_out)}


def _has_norms(known: set[str]) -> bool:
    """Whether norms have parameters at all: OPT's can be without
    (layer_norm_elementwise_affine)."""
    return any("norm." in name for name in known)


def _by_telling_name() -> dict[str, frozenset[str]]:
    """The sets of tensors that belong together, by those of their names that no other set has:
    these tell that it is the one that counts."""
    sets = {one for family in families.FAMILIES.values() for one in family.together}
    counts = Counter(name for one in sets for name in one)
    return {name: one for one in sets for name in one if counts[name] == 1}


def _belonging(own: set[str], together: dict[str, frozenset[str]], has_norms: bool) -> set[str]:
    """What a layer lacks of what belongs to the tensors that it has."""
    sets = [together[name] for name in own & together.keys()]
    if has_norms and _ATTENTION in own and _MLP & own:
        sets.append(_NORMS)
    return set().union(*sets) - own


def _of_model(source: Checkpoint, known: set[str], is_whole: bool) -> Iterator[str]:
    """What a model of such layers has once, if all that it has once is known. OPT-350M, whose
    output is projected, has no last norm."""
    if not is_whole and (
        any(held.row is None and held.layer is None for held in source.index.held)
        or not any(name.startswith(_LAYERS) and name.endswith(_ATTENTION) for name in known)
    ):
        return
    if families.WORD_EMBEDDING not in known:
        yield families.WORD_EMBEDDING
    if _has_norms(known) and "final_norm.weight" not in known and "project_out.weight" not in known:
        yield "final_norm.weight"
    if {
        f"{_LAYERS}0.input_norm.bias",
        "final_norm.weight",
    } <= known and "final_norm.bias" not in known:
        yield "final_norm.bias"


def _of_pairs(source: Checkpoint, known: set[str], strange: set[int | None]) -> Iterator[str]:
    """The weights of which only the bias is there; an output layer that is the word embedding may
    have a bias of its own."""
    for name in sorted(
        {held.canonical for held in source.index.held if held.layer not in strange} & known
    ):
        weight = name.removesuffix(_BIAS) + _WEIGHT
        if name.endswith(_BIAS) and weight not in known and weight != families.HEAD:
            yield weight


def _of_states(source: Checkpoint) -> Iterator[str]:
    """The one moment of tensors that have the other, and the weights of those that have moments."""
    there: dict[str, set[str]] = {
        state: set() for state in (MAIN_PARAM, EXP_AVG, EXP_AVG_SQ, MODEL_PARAM)
    }
    for held in source.index.held:
        there[held.found.state].add(held.canonical)
    stepped = there[EXP_AVG] | there[EXP_AVG_SQ]
    yield from sorted(
        f"{name} ({state})"
        for state in (MAIN_PARAM, EXP_AVG, EXP_AVG_SQ)
        for name in stepped - there[state]
    )
