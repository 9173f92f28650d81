"""Which rank holds what, and in which files, as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.families import HEAD, WORD_EMBEDDING
from parammap.inspection.kinds import KINDS, kind_of
from parammap.inspection.reading import asked
from parammap.tensors.logical import MAIN_PARAM, MODEL_PARAM


def stages(checkpoint: Checkpoint, whole: Checkpoint) -> list[dict[str, Any]]:
    """Each pipeline stage's chunks with their global layers; by the layout files where the tensors
    do not tell chunks.

    The embedding is in a stage's first chunk, an output layer in its last one.
    """
    layers: dict[tuple[int, int], set[int]] = {(pp, 0): set() for pp in range(checkpoint.layout.pp)}
    ends: dict[str, set[int]] = {WORD_EMBEDDING: set(), HEAD: set()}
    for held in whole.index.held:
        place = held.found.place
        if held.layer is not None:
            layers.setdefault((place.pp, place.vpp), set()).add(held.layer)
        if held.row is not None and held.row.canonical in ends:
            ends[held.row.canonical].add(place.pp)
    if not asked(checkpoint).as_trained:
        layers = _recorded_layers(checkpoint) or layers
    stages = []
    for pp in range(checkpoint.layout.pp):
        vpps = sorted(vpp for stage, vpp in layers if stage == pp)
        stages.append(
            {
                "pp": pp,
                "chunks": [
                    {
                        "vpp": vpp,
                        "layers": sorted(layers[pp, vpp]),
                        "embedding": vpp == vpps[0] and pp in ends[WORD_EMBEDDING],
                        "output": vpp == vpps[-1] and pp in ends[HEAD],
                    }
                    for vpp in vpps
                ],
            }
        )
    return stages


def _recorded_layers(checkpoint: Checkpoint) -> dict[tuple[int, int], set[int]]:
    ranks = checkpoint.sidecar.ranks if checkpoint.sidecar else {}
    return {
        (pp, chunk["vpp"]): {number for numbers in chunk["layers"].values() for number in numbers}
        for (_, pp, _), rank in ranks.items()
        if rank.layout
        for chunk in rank.layout["chunks"]
    }


def files_of(whole: Checkpoint) -> dict[Coordinates, list[Path]]:
    """Each rank's files: all in its folder; where ranks share folders, those that hold its
    tensors."""
    if asked(whole).file_kinds is not None:
        return {
            rank: [path for path in sorted(folder.iterdir()) if path.is_file()]
            for rank, folder in whole.rank_folders.items()
        }
    files: dict[Coordinates, set[str]] = {rank: set() for rank in whole.rank_folders}
    for held in whole.index.held:
        place = held.found.place
        files[place.tp, place.pp, place.ep] |= {extent.file for extent in held.found.stored.extents}
    return {rank: sorted(map(Path, names)) for rank, names in files.items()}


def ranks(whole: Checkpoint, files: dict[Coordinates, list[Path]]) -> list[dict[str, Any]]:
    """Each (tp, pp, ep): its folder, the bytes of its files, and the elements of the model it
    holds, by kind."""
    elements: dict[Coordinates, dict[str, int]] = {
        rank: dict.fromkeys(KINDS, 0) for rank in whole.rank_folders
    }
    counted = set()
    for held in whole.index.held:
        one = held.found
        if one.state in (MAIN_PARAM, MODEL_PARAM) and (one.place, one.name) not in counted:
            counted.add((one.place, one.name))
            elements[one.place.tp, one.place.pp, one.place.ep][kind_of(held.canonical)] += (
                one.stored.numel
            )
    return [
        {
            "tp": tp,
            "pp": pp,
            "ep": ep,
            "folder": folder.name,
            "bytes": sum(path.stat().st_size for path in files[tp, pp, ep]),
            "elements": {kind: count for kind, count in elements[tp, pp, ep].items() if count},
        }
        for (tp, pp, ep), folder in sorted(
            whole.rank_folders.items(), key=lambda item: (item[0][1], item[0])
        )
    ]


def files_by_kind(
    checkpoint: Checkpoint, files: dict[Coordinates, list[Path]]
) -> list[dict[str, Any]]:
    known = asked(checkpoint).file_kinds
    kinds: dict[str, list[int]] = {}
    for path in sorted(set().union(*files.values())):
        kind = (
            "tensors"
            if known is None
            else known.get(path.name) or known.get(path.suffix) or "other"
        )
        kinds.setdefault(kind, []).append(path.stat().st_size)
    if checkpoint.sidecar:
        kinds["sidecar"] = [
            path.stat().st_size
            for path in sorted(checkpoint.sidecar.folder.iterdir())
            if path.is_file()
        ]
    return [
        {"kind": kind, "files": len(sizes), "bytes": sum(sizes)}
        for kind, sizes in sorted(kinds.items())
    ]


def sidecar(checkpoint: Checkpoint, files: dict[Coordinates, list[Path]]) -> dict[str, Any] | None:
    if find := asked(checkpoint).sidecar:
        return find(checkpoint, sorted(set().union(*files.values())))
    if (sidecar := checkpoint.sidecar) is None:
        return None
    return {
        "kind": "layout" if sidecar.complete else "maps",
        "folder": str(sidecar.folder),
        "files": len(sidecar.files),
        "ranks": len(sidecar.ranks),
        "iteration": sidecar.iteration,
    }
