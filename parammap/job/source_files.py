"""The source's files: the same at the end as at the beginning, and as their own checksums say."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from parammap.errors import TaskError
from parammap.execute.source_checksums import Run, check
from parammap.execute.writer import Outcome
from parammap.formats import registry
from parammap.proof.stream import in_processes

#: size in bytes, times of the last change of content and of anything in nanoseconds, inode: None
#: where there is no file
Stamp = tuple[int, int, int, int] | None


def stamp_of(file: str) -> Stamp:
    """What tells a file from another one, or from itself after a change."""
    try:
        return _stamp(os.stat(file))
    except FileNotFoundError:
        return None


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """The files of a source, each with its stamp: those that a plan copies from, `archives` that
    were opened for it, and what lies in the source's folders beside tensors."""

    archives: frozenset[str]
    stamps: Mapping[str, Stamp]

    @classmethod
    def of(
        cls,
        copied: Iterable[str],
        archives: Mapping[str, os.stat_result],
        folders: Iterable[Path | None],
    ) -> Self:
        """`folders` may be files, or None; archives are known as they were when they were opened."""
        names = {*copied, *(name for path in filter(None, folders) for name in _metadata(path))}
        stamps = {name: stamp_of(name) for name in sorted(names)}
        stamps |= {name: _stamp(stat) for name, stat in archives.items()}
        return cls(frozenset(archives), stamps)

    def check_unchanged(self) -> None:
        """Raises TaskError for a file that is another one than it was."""
        for file, stamp in self.stamps.items():
            if stamp_of(file) != stamp:
                raise TaskError(f"{file}: was changed while it was read; convert again")

    def check_checksums(self, outcomes: Iterable[Outcome], workers: int) -> str:
        """Hold what was read to the checksums that the files carry, and say how much that was.
        Raises TaskError for a file that is damaged."""
        runs: dict[str, list[Run]] = {file: [] for file in self.archives}
        for outcome in outcomes:
            for file, there in outcome.runs.items():
                runs.setdefault(file, []).extend(there)
        covered = list(in_processes(lambda item: check(*item), sorted(runs.items()), workers))
        damaged = [record for one in covered for record in one.damaged]
        if damaged:
            more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
            raise TaskError(f"{damaged[0].damage}{more}")
        records = sum(one.records for one in covered)
        if not records:
            return "the files that were read carry no checksums"
        nbytes = sum(one.nbytes for one in covered)
        return (
            f"{records} records of the source ({nbytes / 1e9:.2f} GB) fit the checksums they carry"
        )


def _metadata(path: Path) -> Iterator[str]:
    """The files below a folder, or the one that it is, that are of no format of tensors; those that
    are may belong to another checkpoint of the same folder."""
    if path.is_file():
        yield str(path)
    for inner, _, names in os.walk(path):
        yield from (
            os.path.join(inner, name) for name in names if not name.endswith(registry.suffixes())
        )
