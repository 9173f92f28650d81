"""The tree of a checkpoint's logical tensors, as plain data."""

from __future__ import annotations

from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.inspection.kinds import kind_of
from parammap.tensors.logical import MAIN_PARAM


def tensor_tree(whole: Checkpoint) -> list[dict[str, Any]]:
    """Each logical tensor: shape, dtype of each state, how it is split, and who holds it under which
    name."""
    entries: dict[str, dict[str, Any]] = {}
    for tensor, regions in whole.index.shards.items():
        entry = entries.setdefault(
            tensor.name,
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "roles": {},
                "kind": kind_of(tensor.name),
                "split": "",
                "held_by": [],
            },
        )
        entry["roles"][tensor.state] = tensor.dtype
        if tensor.state == MAIN_PARAM:
            rows = any(region.sizes[0] != tensor.rows for region in regions)
            cols = any(region.sizes[1] != tensor.cols for region in regions)
            entry["split"] = "rows" if rows else "columns" if cols else "whole"
    holders: dict[str, dict[tuple[str, int], set[tuple[int, int, int]]]] = {}
    for held in whole.index.held:
        place = held.found.place
        for tensor in (part.tensor for part in held.parts if part.tensor):
            names = holders.setdefault(tensor.name, {})
            names.setdefault((held.found.name, place.vpp), set()).add(
                (place.tp, place.pp, place.ep)
            )
    for name, found in holders.items():
        entries[name]["held_by"] = [
            {"name": key, "vpp": vpp, "ranks": sorted(map(list, places))}
            for (key, vpp), places in sorted(found.items())
        ]
        if (
            entries[name]["split"] != "whole"
            and len({p[0] for places in found.values() for p in places}) == 1
        ):
            entries[name]["split"] = "whole"
    return [entries[name] for name in sorted(entries, key=_natural)]


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts the embedding first and the head last, and layer 10 after layer 9."""
    first = {"embedding": 0, "layers": 1}.get(name.partition(".")[0], 2)
    return [
        (0, first),
        *((0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")),
    ]
