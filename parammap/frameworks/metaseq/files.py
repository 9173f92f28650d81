"""Which files a metaseq checkpoint consists of: model-parallel parts × FSDP shards, by their names.

`<name>[-model_part-P][-shardR].pt` (metaseq, checkpoint_utils.py and trainer.py):
`checkpoint_last-model_part-0-shard1.pt`, `reshard-model_part-3.pt`, `restored.pt`. `<name>` is one
checkpoint's; a training run's folder holds several."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from parammap.errors import RefusedError
from parammap.tensors import grid
from parammap.tensors.names import shorten_names

_FILE = re.compile(r"(?P<name>.+?)(?P<part>-model_part-(\d+))?(?P<shard>-shard(\d+))?\.pt")
#: names that whole models have (metaseq, scripts/convert_to_singleton.py and
#: distributed/stitch_fsdp_ckpt.py)
_WHOLE = re.compile(r"(restored|consolidated|checkpoint.*|reshard.*|.*_consolidated)\.pt")
#: a mixture's experts lie in files of their own (metaseq, distributed/stitch_fsdp_ckpt.py)
_EXPERTS = re.compile(r"-rank-\d+")


@dataclass(frozen=True, slots=True)
class MetaseqFiles:
    """A checkpoint's files: `parts[p][r]` is shard r of part p; or those of one part alone,
    whatever its number."""

    folder: Path
    parts: tuple[tuple[Path, ...], ...]
    is_part_alone: bool


#: the files by number of part and shard, and a checkpoint's by its name and which of the two it has
_Grid = dict[tuple[int, int], Path]
_Groups = dict[tuple[str, bool, bool], _Grid]


def recognizes(source: Path) -> bool:
    """Whether SRC names files that can be a metaseq checkpoint's."""
    return any(path.suffix == ".pt" for path in _named(source))


def find(source: Path, iteration: int | None = None) -> MetaseqFiles:
    """The files of the one checkpoint that SRC names: a folder with one checkpoint (or with that of
    `iteration`), a prefix such as `…/checkpoint_last`, a pattern such as
    `…/checkpoint_last-model_part-1-shard*.pt`, or one file. A pattern or a file may be of one part
    alone, which then counts as a whole model.

    Raises RefusedError where it names none, several or only some of a checkpoint's files.
    """
    paths = sorted(_named(source))
    groups = _groups(paths)
    if iteration is not None:
        groups = {
            key: grid for key, grid in groups.items() if re.search(rf"(^|_){iteration}$", key[0])
        }
    if not groups:
        asked = f" of iteration {iteration}" if iteration is not None else ""
        raise RefusedError(
            f"{source}: no metaseq checkpoint{asked} here; name a folder, a prefix of files or a "
            f".pt file"
        )
    if len(groups) > 1:
        names = "; ".join(
            shorten_names(path.name for path in grid.values()) for grid in groups.values()
        )
        raise RefusedError(
            f"{source}: holds several checkpoints ({names}); name one by its prefix, such as "
            f"{paths[0].parent / next(iter(groups))[0]}"
        )
    (grid,) = groups.values()
    named = not source.is_dir() and source not in _prefixes(paths)
    is_part_alone = named and next(iter(groups))[1] and len({part for part, _ in grid}) == 1
    if is_part_alone:
        grid = {(0, shard): path for (_, shard), path in grid.items()}
    return MetaseqFiles(paths[0].parent, _complete(source, grid), is_part_alone)


def _named(source: Path) -> list[Path]:
    """The files that SRC names; of a folder, those of parts, of shards, and of whole models."""
    if source.is_dir():
        return [
            source / name
            for name in os.listdir(source)
            if (match := _FILE.fullmatch(name))
            and (match.group("part") or match.group("shard") or _WHOLE.fullmatch(name))
        ]
    if source.is_file():
        return [source]
    if glob.has_magic(source.name):
        return [path for path in source.parent.glob(source.name) if path.suffix == ".pt"]
    name = source.name.removesuffix(".pt")
    there = os.listdir(source.parent) if source.parent.is_dir() else []
    return [
        source.parent / one
        for one in there
        if (match := _FILE.fullmatch(one)) and match.group("name") == name
    ]


def _prefixes(paths: list[Path]) -> set[Path]:
    return {
        path.parent / (match.group("name") + ending)
        for path in paths
        if (match := _FILE.fullmatch(path.name))
        for ending in ("", ".pt")
    }


def _groups(paths: list[Path]) -> _Groups:
    """The files of each checkpoint by (part, shard); a number that a name does not have is 0."""
    groups: _Groups = {}
    for path in paths:
        match = _FILE.fullmatch(path.name)
        if match is None:
            raise RefusedError(f"{path}: is no .pt file of metaseq; name one, or its folder")
        name, part, part_number, shard, shard_number = match.groups()
        if _EXPERTS.search(name):
            raise RefusedError(f"{path}: holds a mixture's experts, which cannot be converted yet")
        grid = groups.setdefault((name, part is not None, shard is not None), {})
        there = grid.setdefault((int(part_number or 0), int(shard_number or 0)), path)
        if there is not path:
            raise RefusedError(
                f"{path}: is of the same part and shard as {there.name}; leave only one of them"
            )
    return groups


def _complete(source: Path, files: _Grid) -> tuple[tuple[Path, ...], ...]:
    parts, shards = (range(1 + max(key[dim] for key in files)) for dim in (0, 1))
    if missing := grid.missing(files, (parts, shards)):
        count, (part, shard) = missing
        raise RefusedError(
            f"{next(iter(files.values())).parent}: {count} of {len(parts) * len(shards)} files are "
            f"missing, the first is part {part} shard {shard} ({source.name}); copy the whole "
            "checkpoint"
        )
    return tuple(tuple(files[part, shard] for shard in shards) for part in parts)
