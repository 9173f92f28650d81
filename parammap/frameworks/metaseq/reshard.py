"""A metaseq checkpoint over another number of model-parallel parts: the same logical tensors, cut
anew; heads never cut.

What of a part is no tensor comes from the part of the same number, or, for further parts, from the
source's in turn."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from parammap import families
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import Index, NameResolver, StoredTensor, atom_name
from parammap.errors import RefusedError
from parammap.formats.pickles import Opaque
from parammap.frameworks.metaseq import reader as metaseq
from parammap.frameworks.metaseq.metadata import join
from parammap.tensors.arrangement import KVQ, arranged, local_shape, whole_shape
from parammap.tensors.layout import Place, TargetLayout
from parammap.tensors.logical import MAIN_PARAM, Stored
from parammap.tensors.names import shorten_names
from parammap.tensors.shard import Shard

#: the parts of qkv_proj, in order; a model of one part may have them as tensors of their own
#: (metaseq, TransformerLanguage-
#: Model's MultiheadAttention against ModelParallelMultiheadAttention)
SPLIT = {"k_proj": "k", "v_proj": "v", "q_proj": "q"}
FUSED = "qkv_proj"


def resharded(source: Checkpoint, target_layout: TargetLayout) -> Checkpoint:
    """The source as `wish.layout.tp` parts, in memory: its tensors have no place on disk.

    Raises RefusedError for a layout that metaseq does not have, where a tensor cannot be divided,
    with its numbers, and where nobody knows how one is cut."""
    layout = target_layout.layout
    if extra := [name for name in ("pp", "vpp", "ep", "cp") if getattr(layout, name) != 1]:
        raise RefusedError(
            f"{source.folder}: metaseq has no {' and no '.join(extra)}; only tp (its model parts) "
            "and dp (its shards) can be chosen"
        )
    naming, parts = metaseq.naming_of(source), layout.tp
    ranks = {(part, 0, 0): (part % source.layout.tp, 0, 0) for part in range(parts)}
    held = [one for rank in ranks for one in _part(source, naming, parts, rank[0])]
    shapes = {
        one.found.name: one.found.stored.shape for one in held if one.found.state == MAIN_PARAM
    }  # all parts' alike
    rank_metadata = {
        rank: _meta(source.rank_metadata[old], rank[0], parts, shapes)
        for rank, old in ranks.items()
    }
    notes = [f"parts {source.layout.tp} and on repeat the random states of the first ones"] * (
        parts > source.layout.tp
    )
    return replace(
        source,
        layout=layout,
        index=Index(held, layout),
        rank_metadata=rank_metadata,
        training_states={rank: source.training_states[old] for rank, old in ranks.items()},
        notes=[*source.notes, *notes],
        rank_folders={rank: source.rank_folders[old] for rank, old in ranks.items()},
        sidecar=None,
    )


# --------------------------------------------------------------------------------------------------------
# its tensors


def _part(
    source: Checkpoint, naming: NameResolver, parts: int, part: int
) -> Iterator[StoredTensor]:
    """What part `part` of `parts` holds, in the order of the source's first part."""
    first = [held for held in source.index.held if held.found.place.tp == 0]
    if unknown := sorted({held.found.name for held in first if held.kind is None}):
        raise RefusedError(
            f"{source.folder}: nobody recorded how {len(unknown)} tensors are cut over parts: "
            f"{shorten_names(unknown)}; leave the number of parts"
        )
    known = {(tensor.state, tensor.name): tensor for tensor in source.index.holders}
    for held in _fused(first) if parts > 1 else first:
        shape = _local(source, held, naming, parts)
        there = arranged(held.kind, shape, parts, part, naming.sizes)
        tensors = [
            known[held.found.state, atom_name(held.canonical, held.kind, one.name)] for one in there
        ]
        shards = tuple(
            Shard(tensor, one.region, one.view) for tensor, one in zip(tensors, there, strict=True)
        )
        found = replace(held.found, place=Place(part), stored=Stored(tensors[0].dtype, shape, ()))
        yield StoredTensor(found, held.canonical, held.row, held.kind, shards)


def _fused(first: list[StoredTensor]) -> Iterator[StoredTensor]:
    """The tensors of one part with k_proj, v_proj and q_proj as one qkv_proj, where the first of
    them stands."""
    rows = {(held.found.state, held.found.name): held.found.stored.shape for held in first}
    seen: set[tuple[str, str]] = set()
    for held in first:
        name = fused_name(held.found.name)
        if name == held.found.name:
            yield held
        elif (held.found.state, name) not in seen:
            seen.add((held.found.state, name))
            shapes = [rows[held.found.state, name.replace(FUSED, one)] for one in SPLIT]
            stored = replace(
                held.found.stored,
                shape=(sum(shape[0] for shape in shapes), *shapes[0][1:]),
                extents=(),
            )
            row, found = (
                families.find(name, families.METASEQ),
                replace(held.found, name=name, stored=stored),
            )
            assert row is not None, name  # _part refuses names that no row has
            yield StoredTensor(found, row.canonical.format(i=held.layer), row, KVQ, ())


def fused_name(name: str) -> str:
    """The name of the fused tensor that k_proj, v_proj or q_proj is a part of; any other name as it
    is."""
    part = name.split(".")[-2:-1]
    return name.replace(part[0], FUSED) if part and part[0] in SPLIT else name


def _local(
    source: Checkpoint, held: StoredTensor, naming: NameResolver, parts: int
) -> tuple[int, ...]:
    there, shape = source.layout.tp, held.found.stored.shape
    assert held.kind is not None, held.found.name  # _part refuses what nobody knows how to cut
    whole = whole_shape(held.kind, shape, there)
    if held.kind == KVQ and naming.sizes.heads is None and there % parts == 0:
        return (whole[0] // parts, *whole[1:])  # whole parts come together
    if held.kind == KVQ and naming.sizes.heads is None:
        raise RefusedError(
            f"{source.folder}: the number of attention heads is not recorded, so {there} parts "
            f"cannot become "
            f"{parts}; name a file that has it with --metadata-from, or take a divisor of {there}"
        )
    try:
        return local_shape(held.kind, whole, parts, naming.sizes)
    except RefusedError as error:
        raise RefusedError(f"{source.folder}: {held.found.name} {list(whole)}: {error}") from error


# --------------------------------------------------------------------------------------------------
# what is no tensor


def _meta(
    meta: dict[str, Any], part: int, parts: int, shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Part `part`'s file but its model, for a run of `parts` parts whose tensors have these
    shapes."""
    meta = {**meta, "cfg": with_parts(meta.get("cfg"), parts, part)}
    if meta.get("shard_metadata"):
        entries = [
            {
                **entry,
                "params": {
                    flat: _param(entry["fsdp_path"], param, shapes)
                    for flat, param in entry["params"].items()
                },
            }
            for entry in meta["shard_metadata"]["param_metadata"]
        ]
        meta["shard_metadata"] = {**meta["shard_metadata"], "param_metadata": entries}
    return meta


def _param(path: str, param: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    names = list(
        dict.fromkeys(
            name if join(path, name) in shapes else fused_name(name) for name in param["names"]
        )
    )
    sizes = [shapes[join(path, name)] for name in names]
    return {**param, "names": names, "shapes": sizes, "numels": [math.prod(size) for size in sizes]}


def with_parts(cfg: object, parts: int, part: int = 0) -> object:
    """A copy of a configuration (plain dicts and argparse.Namespace, or omegaconf's records) for
    this number of parts, as the first rank of `part` has it."""
    cfg, says = copy.deepcopy(cfg), {"model_parallel_size": parts, "distributed_rank": part}
    seen: set[int] = set()
    trees = [cfg]
    while trees:
        tree = trees.pop()
        if id(tree) in seen:
            continue
        seen.add(id(tree))
        if isinstance(tree, dict):
            for name in says.keys() & tree.keys():
                tree[name] = _with_value(tree[name], says[name])
            trees += tree.values()
        elif isinstance(tree, (list, tuple)):
            trees += tree
        elif isinstance(tree, Opaque):
            trees += [tree.args, tree.state, tree.items, [value for _, value in tree.pairs]]
    return cfg


def _with_value(value: object, number: int) -> object:
    """The number, or omegaconf's node that holds it (omegaconf 2, nodes.ValueNode)."""
    if isinstance(value, Opaque) and isinstance(value.state, dict) and "_val" in value.state:
        value.state["_val"] = number
        return value
    return number
