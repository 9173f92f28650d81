"""What is wrong with an output's files beside their tensors: missing, of another size, damaged, with
other scalars."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parammap.checkpoint.manifest import Manifest
from parammap.execute.gather import Files
from parammap.proof.contents import entries_of
from parammap.proof.coverage import Coverage
from parammap.tensors.logical import Stored
from parammap.tensors.view import row_major


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, about a tensor where it has a name."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def missing_files(root: Path, manifest: Manifest) -> Iterator[Problem]:
    for name, nbytes in manifest.files.items():
        path = root / name
        size = path.stat().st_size if path.is_file() else None
        if size != nbytes:
            yield Problem(
                str(path), "is missing" if size is None else f"has {size} bytes and not {nbytes}"
            )


def damaged(covered: Coverage) -> Iterator[Problem]:
    for path, record in covered.damaged:
        yield Problem(
            str(path), f"the content of its record {record} does not fit the record's checksum"
        )


def wrong_scalars(root: Path, manifest: Manifest) -> Iterator[Problem]:
    """The scalars of MindSpore's files: tensors that are part of no logical tensor."""
    with Files() as files:
        for group in manifest.scalars:
            for path in group["files"]:
                there = dict(entries_of(root / path))
                for name, expected in group["values"].items():
                    yield from _wrong_scalar(name, there.get(name), expected, path, files)


def _wrong_scalar(
    name: str, stored: Stored | None, expected: str, path: str, files: Files
) -> Iterator[Problem]:
    if stored is None:
        yield Problem(name, f"is missing in {path}")
        return
    (extent,) = stored.extents
    content = files.bits(row_major((stored.nbytes,), "uint8", extent.file, extent.offset))
    if content.tobytes().hex() != expected:
        yield Problem(
            name,
            f"{path} holds the bytes {content.tobytes().hex()} at byte {extent.offset} and not "
            f"{expected}",
        )
