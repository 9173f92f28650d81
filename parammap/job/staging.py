"""The output folder: staged beside its place, journalled so that a killed run goes on, published
whole by one rename."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from parammap.checkpoint.manifest import Manifest, read_whole
from parammap.errors import RefusedError
from parammap.execute.checks import Misfit, NonFinite, Overflown, Unequal
from parammap.execute.durable import sync
from parammap.execute.source_checksums import Run
from parammap.execute.writer import Outcome
from parammap.tensors.logical import LogicalTensor

#: what an outcome says of elements, beside misfits
_FOUND = {"unequal": Unequal, "non_finite": NonFinite, "overflown": Overflown}


class Staging:
    """`.NAME.parammap/` beside the target NAME: `out/` becomes the target, `journal` lists the
    files done so far."""

    def __init__(self, target: Path, fingerprint: str, overwrite: bool) -> None:
        self.target, self.fingerprint, self.overwrite = target, fingerprint, overwrite
        self.folder = target.parent / f".{target.name}.parammap"
        self.out, self.old = self.folder / "out", self.folder / "old"
        self.journal = self.folder / "journal"
        self._lock: TextIO | None = None

    def open(self) -> dict[str, Outcome]:
        """Lock the staging folder and return what an earlier, killed run of the same conversion
        finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "w")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RefusedError(
                f"{self.target}: another conversion into it is running; wait for it to end"
            ) from None
        if self.old.exists() and not self.target.exists():
            os.rename(self.old, self.target)
        done = self._resumable()
        if not done:
            shutil.rmtree(self.out, ignore_errors=True)
            self.out.mkdir()
            self.journal.write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n")
        return done

    def _resumable(self) -> dict[str, Outcome]:
        if not self.journal.is_file() or not self.out.is_dir():
            return {}
        try:
            lines = self.journal.read_text().splitlines(keepends=True)
            first, *whole = (json.loads(line) for line in lines if line.endswith("\n"))
            if first["fingerprint"] != self.fingerprint:
                return {}
            outcomes = {outcome.path: outcome for outcome in map(_outcome, whole)}
        except (ValueError, KeyError, TypeError):
            return {}  # damaged, or not begun: every file is written again
        return {
            path: o
            for path, o in outcomes.items()
            if (self.out / path).is_file() and (self.out / path).stat().st_size == o.nbytes
        }

    def record(self, outcome: Outcome) -> None:
        """Note a file that is durable. The note itself need not be: without it the file is written
        again."""
        with open(self.journal, "a") as journal:
            journal.write(json.dumps(_entry(outcome)) + "\n")

    def link(self, links: Iterable[tuple[str, str]]) -> str:
        """Make `link` a second name of `existing`, or a copy where the file system has no hard
        links; says which."""
        how = "none"
        for link, existing in links:
            path = self.out / link
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            try:
                os.link(self.out / existing, path)
                how = "hard links"
            except OSError:
                shutil.copyfile(self.out / existing, path)
                how = "copies"
        return how

    def adopt(self, paths: Iterable[str]) -> None:
        """Give files that the target holds a place in the new one as well; publishing then replaces
        the target."""
        for path in paths:
            (self.out / path).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.target / path, self.out / path)
            except OSError:
                shutil.copyfile(self.target / path, self.out / path)
            self.overwrite = True

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest, make everything durable, and rename the whole into place."""
        manifest.write(self.out)
        for folder, _, _ in os.walk(self.out):
            sync(Path(folder))
        if self.target.exists():
            if self.overwrite and any(self.target.iterdir()):
                os.rename(self.target, self.old)
            else:
                self.target.rmdir()
        os.rename(self.out, self.target)
        sync(self.target.parent)
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def check_target(target: Path, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Refuse a target that is a file, that holds an input, or that has content that may not be
    replaced."""
    for path in inputs:
        if target.resolve() in (path.resolve(), *path.resolve().parents):
            raise RefusedError(
                f"{target}: holds {path}, which is read; choose another folder for the output"
            )
    if target.exists() and not target.is_dir():
        raise RefusedError(f"{target}: is a file; name a folder for the output")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise RefusedError(
            f"{target}: is not empty; choose another folder, or replace it with --overwrite"
        )


def published(target: Path, fingerprint: str) -> Manifest | None:
    """The manifest of an output that this very conversion, or this part of one, has published
    before. Raises RefusedError for one that is damaged."""
    manifest = read_whole(target)
    return manifest if manifest and fingerprint in manifest.fingerprints else None


def _entry(outcome: Outcome) -> dict[str, Any]:
    return {
        "path": outcome.path,
        "bytes": outcome.nbytes,
        "crc32": outcome.crc32,
        "runs": outcome.runs,
        "digests": [
            [*_key(tensor), replica, digest, count]
            for (tensor, replica), (digest, count) in outcome.digests.items()
        ],
        "misfits": [
            [*_key(tensor), m.count, m.positions, m.window.hex(), m.sums]
            for tensor, m in outcome.misfits.items()
        ],
        **{
            name: [
                [*_key(tensor), one.count, one.positions]
                for tensor, one in getattr(outcome, name).items()
            ]
            for name in _FOUND
        },
    }


def _key(tensor: LogicalTensor) -> list[Any]:
    return [tensor.state, tensor.name, tensor.dtype, list(tensor.shape)]


def _tensor(key: list[Any]) -> LogicalTensor:
    state, name, dtype, shape = key
    return LogicalTensor(state, name, dtype, tuple(shape))


def _outcome(entry: dict[str, Any]) -> Outcome:
    outcome = Outcome(entry["path"], entry["bytes"], entry["crc32"])
    outcome.runs = {file: [Run(*run) for run in runs] for file, runs in entry["runs"].items()}
    for *key, replica, digest, count in entry["digests"]:
        outcome.digests[_tensor(key), replica] = digest, count
    for *key, count, positions, window, sums in entry["misfits"]:
        tensor = _tensor(key)
        outcome.misfits[tensor] = Misfit(
            tensor, count, [tuple(p) for p in positions], bytes.fromhex(window), tuple(sums)
        )
    for name, kind in _FOUND.items():
        for *key, count, positions in entry[name]:
            getattr(outcome, name)[_tensor(key)] = kind(
                _tensor(key), count, [tuple(p) for p in positions]
            )
    return outcome
