"""A model without its layout: what its state dict holds in which order, and what each tensor is as
a whole.

Put together from the state dicts of all pipeline stages and expert ranks, and taken apart again for
another layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from parammap import families
from parammap.checkpoint import extra_states
from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.checkpoint.cuts import UNRECORDED, Partition
from parammap.checkpoint.index import NameResolver, StoredTensor, TensorEntry
from parammap.checkpoint.sidecar import Sidecar
from parammap.errors import RefusedError
from parammap.frameworks.megatron import registration
from parammap.tensors.arrangement import GROUPED, whole_shape
from parammap.tensors.layout import Place
from parammap.tensors.logical import MAIN_PARAM, Stored, TensorSpec
from parammap.tensors.names import shorten_names

#: what the sidecar says of how a tensor is cut, by its place and name
_Facts = dict[tuple[Place, str], Partition]
#: how each dialect's state dict names the last stage's copy of the word embedding
_HEAD_KEYS = {
    families.LEGACY: ("word_embeddings_for_head", "weight"),
    families.CORE: ("output_layer.weight",),
}
_NOWHERE = Stored("float32", (), ())


@dataclass(frozen=True, slots=True)
class WholeParameter:
    """A tensor of the model: its fused canonical name, arrangement ('' where it is not known, which
    is refused), and dtype and shape as a whole; `is_head` for the last stage's copy of the word
    embedding."""

    canonical: str
    kind: str
    row: families.Row | None
    dtype: str
    shape: tuple[int, ...]
    is_head: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a state dict: the `keys` that lead there, with the local numbers of some rank; the
    global numbers of its layer and expert, if it is of one; what it holds: a parameter, or
    something that is no tensor."""

    keys: tuple[str, ...]
    layer: int | None
    expert: int | None
    content: object

    @property
    def name(self) -> str:
        return ".".join(self.keys)

    @property
    def is_of_experts(self) -> bool:
        return self.expert is not None or (
            isinstance(self.content, WholeParameter) and self.content.kind in GROUPED
        )

    @property
    def path(self) -> str:
        """Of the list of layers; '' if it is of none."""
        layer = families.layer_of(self.name)
        return layer[0] if layer else ""

    def at(self, layer: int | None, expert: int | None) -> Entry:
        """The same under other local numbers."""
        return replace(self, keys=tuple(families.renumber(key, layer, expert) for key in self.keys))


@dataclass(slots=True)
class ModelEntries:
    """What stands before the layers, in each layer, and behind them, in the order of the state
    dict."""

    dialect: str
    experts: int
    tied: bool | None
    first: list[Entry] = field(default_factory=list)
    layers: dict[int, list[Entry]] = field(default_factory=dict)
    last: list[Entry] = field(default_factory=list)

    def chunk(
        self, layers: range, experts: range, is_first: bool, is_last: bool
    ) -> Iterator[Entry]:
        """The state dict of the chunk that holds these layers and experts, under its own local
        numbers."""
        if is_first:
            yield from self.first
        for local, number in enumerate(layers):
            for entry in self.layers[number]:
                if entry.expert is None:
                    yield entry.at(local, None)
                elif entry.expert in experts:
                    yield entry.at(local, entry.expert - experts.start)
        if is_last:
            yield from (
                entry for entry in self._last() if not (is_first and _is_head(entry))
            )  # then it is the embedding

    def _last(self) -> list[Entry]:
        """What stands behind the layers, with the copy of the word embedding that a tied head
        is."""
        if not self.tied or any(map(_is_head, self.last)):
            return self.last
        embedding = next(
            entry.content
            for entry in self.first
            if isinstance(entry.content, WholeParameter)
            and entry.content.canonical == families.WORD_EMBEDDING
        )
        row = families.find(".".join(_HEAD_KEYS[self.dialect]), self.dialect)
        head = Entry(
            _HEAD_KEYS[self.dialect], None, None, replace(embedding, row=row, is_head=True)
        )
        behind = [entry for entry in self.last if entry.name.startswith("output_layer.")]
        return [entry for entry in self.last if entry not in behind] + [head] + behind

    def parameters(self) -> Iterator[WholeParameter]:
        for entries in (
            self.first,
            *(self.layers[number] for number in sorted(self.layers)),
            self.last,
        ):
            yield from (
                entry.content for entry in entries if isinstance(entry.content, WholeParameter)
            )


def _is_head(entry: Entry) -> bool:
    return isinstance(entry.content, WholeParameter) and entry.content.is_head


def model_of(
    source: Checkpoint, structures: dict[Coordinates, list[dict[str, Any]]], naming: NameResolver
) -> ModelEntries:
    """The model that a checkpoint's state dicts (by rank, a list of chunks) make up; `naming` is of
    their names.

    Raises RefusedError for tensors of which nobody knows how they are cut, and for several stacks
    of layers."""
    experts = (naming.experts_per_rank or 0) * source.layout.ep or naming.sizes.experts or 0
    model = ModelEntries(naming.dialect, experts, naming.tied)
    seen: dict[tuple[str, ...], Entry] = {}
    facts = _partition_facts(source.sidecar)
    for (tp, pp, ep), chunks in sorted(
        structures.items(), key=lambda item: (item[0][1], item[0][2])
    ):
        for number, tree in enumerate(chunks if tp == 0 else ()):
            _add_chunk(model, tree, Place(0, pp, ep, number), naming, facts, seen)
    _refuse_unknown(source, model)
    for entries in model.layers.values():
        entries.sort(key=_order(entries))
    if source.sidecar:
        _check_order(model, source.sidecar, naming)
    if source.layout.pp == 1:
        model.tied = not any(
            entry.content.canonical == families.HEAD
            for entry in model.last
            if isinstance(entry.content, WholeParameter)
        )
    return model


def _partition_facts(sidecar: Sidecar | None) -> _Facts:
    return {
        (Place(tp, pp, ep, buffer.chunk), slot.name): slot.partition
        for (tp, pp, ep), known in (sidecar.ranks if sidecar else {}).items()
        for buffers in known.optimizers
        for buffer in buffers or ()
        for slot in buffer.slots
    }


def _add_chunk(
    model: ModelEntries,
    tree: dict[str, Any],
    place: Place,
    naming: NameResolver,
    facts: _Facts,
    seen: dict[tuple[str, ...], Entry],
) -> None:
    outside = model.first if (place.pp, place.vpp) == (0, 0) else model.last
    for keys, leaf in _walk(tree):
        entry = _entry(keys, leaf, place, naming, facts)
        if entry.layer is not None:
            outside = model.last
        key = entry.at(entry.layer, entry.expert).keys
        if key not in seen:
            seen[key] = entry
            side = model.last if _is_behind(entry) else outside
            (side if entry.layer is None else model.layers.setdefault(entry.layer, [])).append(
                entry
            )


def _is_behind(entry: Entry) -> bool:
    """Whether a tensor stands behind the layers, wherever the state dict names it."""
    return isinstance(entry.content, WholeParameter) and (
        entry.content.is_head or entry.content.canonical.startswith(("output.", "final_norm."))
    )


def _walk(tree: object, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if keys and extra_states.is_one(keys[-1]):
        yield keys, None
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _walk(value, (*keys, key))
    else:
        yield keys, tree


def _entry(
    keys: tuple[str, ...], leaf: object, place: Place, naming: NameResolver, facts: _Facts
) -> Entry:
    name = ".".join(keys)
    content = leaf
    if isinstance(leaf, TensorSpec):
        held = naming.hold(
            TensorEntry(
                name,
                place,
                MAIN_PARAM,
                Stored(leaf.dtype, leaf.shape, ()),
                facts.get((place, name), UNRECORDED),
            )
        )
        content = _parameter(held, naming)
    return Entry(keys, naming.layer(name, place), naming.expert(name, place), content)


def _parameter(held: StoredTensor, naming: NameResolver) -> WholeParameter:
    stored = held.found.stored
    shape = (
        whole_shape(held.kind, stored.shape, naming.layout.tp, naming.layout.ep)
        if held.kind
        else stored.shape
    )
    return WholeParameter(
        held.canonical, held.kind or "", held.row, stored.dtype, shape, held.is_tied_head
    )


def _refuse_unknown(source: Checkpoint, model: ModelEntries) -> None:
    unknown = sorted(
        {parameter.canonical for parameter in model.parameters() if not parameter.kind}
    )
    if unknown:
        raise RefusedError(
            f"{source.folder}: nobody recorded how {len(unknown)} tensors are cut over ranks, or "
            f"the sidecar and the family's table contradict each other: {shorten_names(unknown)}; "
            "leave the sizes out"
        )
    stacks = sorted({entry.path for entries in model.layers.values() for entry in entries})
    if len(stacks) != 1:
        raise RefusedError(
            f"{source.folder}: has {len(stacks)} stacks of layers ({', '.join(stacks)}), and only "
            "one can be laid out anew; leave the sizes out"
        )


def _check_order(model: ModelEntries, sidecar: Sidecar, naming: NameResolver) -> None:
    """Refuse a state dict that names parameters in another order than the buffers, as new ones
    would be filled in it."""
    places = {parameter.canonical: number for number, parameter in enumerate(model.parameters())}
    places.pop(families.WORD_EMBEDDING, None)  # the last stage's copy has its name, too
    for (tp, pp, ep), known in sidecar.ranks.items():
        for buffer in (
            buffer for buffers in known.optimizers for buffer in buffers or () if tp == 0
        ):
            there = [
                (number, name)
                for name in registration.names_of(buffer)
                for found in [
                    TensorEntry(name, Place(0, pp, ep, buffer.chunk), MAIN_PARAM, _NOWHERE)
                ]
                if (number := places.get(naming.canonical(found))) is not None
            ]
            for (first, before), (second, after) in pairwise(there):
                if first > second:
                    raise RefusedError(
                        f"{sidecar.folder}: has {before} registered before {after}, and the "
                        f"model's state "
                        "dict has them the other way round; they are of different runs"
                    )


def _order(entries: list[Entry]) -> Callable[[Entry], tuple[int, int, int]]:
    """The order of a layer's entries when experts of several ranks come together: what is of
    experts stands where the first of its list does, expert by expert (local_experts.0.…,
    local_experts.1.… and weight0, weight1 … alike)."""
    lists: dict[str, int] = {}
    patterns: dict[str, int] = {}

    def key(entry: Entry) -> tuple[int, int, int]:
        pattern = families.renumber(entry.name, None, 0)
        before = families.before_expert(entry.name) or pattern
        return (
            lists.setdefault(before, len(lists)),
            entry.expert if entry.expert is not None else -1,
            patterns.setdefault(pattern, len(patterns)),
        )

    for entry in entries:
        key(entry)
    return key
