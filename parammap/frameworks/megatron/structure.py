"""The shape of a Megatron-LM model's state dict: described, walked, or put together from names
where it is not recorded.

Legacy models nest their state dicts, megatron-core's are flat; both hold `_extra_state: None` for
each linear layer (Megatron-LM, core/tensor_parallel/layers.py and legacy/model/language_model.py,
core_r0.6.0)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from parammap import families
from parammap.checkpoint import extra_states
from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.checkpoint.index import NameResolver
from parammap.checkpoint.sidecar import Sidecar, Slot
from parammap.errors import RefusedError
from parammap.frameworks.megatron import registration
from parammap.frameworks.megatron.facts import Facts, experts_per_rank, global_layers, is_gated
from parammap.tensors.layout import Layout
from parammap.tensors.logical import TensorSpec

Leaf = TypeVar("Leaf")

#: the linear layers that hold an extra state, by the last part of their module's name
_LINEAR = (
    "query_key_value",
    "dense",
    "dense_h_to_4h",
    "dense_4h_to_h",
    "linear_qkv",
    "linear_proj",
    "linear_fc1",
    "linear_fc2",
)
#: parts of a legacy language model whose own state dict is flat
_FLAT_PARTS = ("encoder", "decoder", "pooler")


def specified(
    tree: Any, tensor: Callable[[object], tuple[str, tuple[int, ...]] | None], prefix: str = ""
) -> Any:
    """The tree with a TensorSpec, under its dotted path, for each leaf of which `tensor` tells
    dtype and shape; extra states stay as they are."""
    if extra_states.is_one(prefix):
        return tree
    if known := tensor(tree):
        return TensorSpec(prefix, *known)
    if isinstance(tree, dict):
        return {
            key: specified(value, tensor, f"{prefix}.{key}" if prefix else str(key))
            for key, value in tree.items()
        }
    return tree


def leaves(tree: object, kind: type[Leaf]) -> Iterator[Leaf]:
    """The leaves of one kind in nested dicts and lists."""
    if isinstance(tree, kind):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(value, kind)


def structures_of(source: Checkpoint) -> dict[Coordinates, list[dict[str, Any]]]:
    """Each rank's chunks, with a TensorSpec for each tensor: as recorded, else put together from
    the sidecar.

    Raises RefusedError if neither tells.
    """
    structures = {}
    for rank in source.rank_folders:
        structures[rank] = source.structures.get(rank) or []
        if not structures[rank]:
            if source.sidecar is None:
                raise RefusedError(
                    f"{source.folder}: neither the model's structure nor a sidecar is recorded in "
                    "pt_meta; name the folder of the sidecar with --sidecar"
                )
            structures[rank] = structures_from_slots(source.sidecar, rank, source.layout.vpp)
    return structures


def megatron_naming(
    source: Checkpoint, structures: dict[Coordinates, list[dict[str, Any]]]
) -> NameResolver:
    """The naming of a checkpoint's tensors under the names that Megatron-LM gives them, whatever
    framework it is of."""
    facts = Facts.of_checkpoint(source)
    chunks = {
        (rank, number): {spec.name: spec.shape for spec in leaves(tree, TensorSpec)}
        for rank, trees in structures.items()
        for number, tree in enumerate(trees)
    }
    names = [name for shapes in chunks.values() for name in shapes]
    dialect = families.dialect_of(names)
    layers = global_layers(((rank[1], number), shapes) for (rank, number), shapes in chunks.items())
    return NameResolver(
        dialect,
        source.layout,
        layers,
        experts_per_rank(names),
        facts.sizes(),
        is_gated(chunks.values(), dialect),
        facts.tied(),
    )


def rank_folder(layout: Layout, rank: Coordinates) -> str:
    """The name of a rank's folder."""
    tp, pp, ep = rank
    return (
        f"mp_rank_{tp:02d}"
        + (f"_{pp:03d}" if layout.pp > 1 else "")
        + (f"_{ep:03d}" if layout.ep > 1 else "")
    )


def nested(entries: Iterable[tuple[tuple[str, ...], object]]) -> dict[str, Any]:
    """Nested dicts from pairs of keys and leaf."""
    tree: dict[str, Any] = {}
    for keys, leaf in entries:
        _insert(tree, list(keys), leaf)
    return tree


def structures_from_slots(sidecar: Sidecar, rank: Coordinates, vpp: int) -> list[dict[str, Any]]:
    """Each chunk's state dict, with a TensorSpec for each parameter, in the order of
    named_parameters().

    Dense parameters that only the first expert rank's optimizer holds are in every expert rank's
    model."""
    chunks: list[dict[str, Any]] = []
    for chunk in range(vpp):
        buffers = [buffer for buffer in sidecar.buffers(rank) if buffer.chunk == chunk]
        slots: dict[str, Slot] = {slot.name: slot for buffer in buffers for slot in buffer.slots}
        sequences = [registration.names_of(buffer) for buffer in buffers]
        tree: dict[str, Any] = {}
        for slot in map(slots.__getitem__, registration.in_order(slots, sequences)):
            _insert(tree, _path(slot.name), TensorSpec(slot.name, slot.dtype, slot.shape))
        chunks.append(_with_extra_states(tree))
    return chunks


def _path(name: str) -> list[str]:
    """The keys that lead to a parameter: 'language_model', 'encoder', 'layers.0.…' for legacy
    models."""
    parts = name.split(".")
    if parts[0] == "language_model" and parts[1] in _FLAT_PARTS:
        return [*parts[:2], ".".join(parts[2:])]
    if parts[0] == "language_model" or parts[0] == "word_embeddings_for_head":
        return parts
    return [name]


def _insert(tree: dict[str, Any], path: list[str], leaf: object) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _with_extra_states(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with `_extra_state: None` after the last tensor of each linear layer."""
    result, keys = {}, list(tree)
    for number, key in enumerate(keys):
        value = tree[key]
        result[key] = _with_extra_states(value) if isinstance(value, dict) else value
        module = key.rpartition(".")[0]
        following = keys[number + 1].rpartition(".")[0] if number + 1 < len(keys) else ""
        if module and module != following and module.rpartition(".")[2] in _LINEAR:
            result[f"{module}._extra_state"] = None
    return result
