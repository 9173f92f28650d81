"""Whose a file is: the rank that it says wrote it, compared with the place where it lies.

Each process of a training writes its own number into its files. A tool that writes all files by
itself leaves the same number in all of them (Megatron-LM's tools/checkpoint, Yuan's and metaseq's
scripts), which then says nothing; two such files that are equal byte for byte are still one file
put over another."""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parammap.checkpoint import manifest
from parammap.errors import RefusedError
from parammap.formats import regular_file
from parammap.tensors.layout import Layout, Place

_HEAD_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Owned:
    """A file, the rank that it says wrote it (None: it says none), whether that rank's file may lie
    here, and what lies here."""

    path: Path
    rank: int | None
    fits: Callable[[int], bool]
    place: str


def check(folder: Path, files: Sequence[Owned]) -> None:
    """Refuse files that lie where another rank's should, and one that was put over another's."""
    said = [file for file in files if file.rank is not None]
    if len(said) < 2 or _was_relaid_without(folder):
        return
    if len({file.rank for file in said}) == 1:
        _check_copies(said)
        return
    for file in files:
        if file.rank is not None and not file.fits(file.rank):
            raise RefusedError(
                f"{file.path}: was written by rank {file.rank}, which is not {file.place}; files "
                f"of two "
                "ranks were exchanged, or one was put over another: copy the whole checkpoint "
                "again"
            )


def check_ranks(
    folder: Path, layout: Layout, files: Iterable[tuple[Path, Mapping[str, Any], Place]]
) -> None:
    """The same for files that keep the arguments of Megatron-LM's rank that wrote them."""
    check(
        folder,
        [
            Owned(path, args.get("rank"), _fits(layout, args, place), str(place))
            for path, args, place in files
        ],
    )


def _fits(layout: Layout, args: Mapping[str, Any], place: Place) -> Callable[[int], bool]:
    """Whether a rank of Megatron-LM's is one of a place, whichever of its data- and
    context-parallel ranks it is; all are where the arguments say a world of another size, or the
    rank is of a larger one, as then its order is not known."""
    world = layout.tp * layout.pp * layout.cp * layout.dp
    if args.get("world_size") != world:
        return lambda rank: True
    return lambda rank: rank >= world or (place.tp, place.pp, place.ep) in layout.places_of(rank)


def _was_relaid_without(folder: Path) -> bool:
    """Whether an earlier ParamMap laid a checkpoint out anew, and left the ranks of the old layout
    in it."""
    known = next(filter(None, map(manifest.read_whole, (folder, folder.parent))), None)
    return known is not None and known.keeps_ranks_of_source


def _check_copies(files: Sequence[Owned]) -> None:
    seen: dict[tuple[int, bytes], Path] = {}
    for file in files:
        with regular_file.opened(file.path) as stream:
            head = hashlib.sha256(stream.read(_HEAD_BYTES)).digest()
        first = seen.setdefault((file.path.stat().st_size, head), file.path)
        if first is not file.path and filecmp.cmp(first, file.path, shallow=False):
            raise RefusedError(
                f"{file.path}: is the same file as {first}, and should be {file.place}'s own; copy "
                f"the whole "
                "checkpoint again"
            )
