"""The output folder: staged beside its place, journalled so that a killed run goes on, published
whole.

Beside the target NAME, on its file system, lies `.NAME.parammap/`:

    lock      locked while a run works here; says which process that is
    journal   the fingerprint of the conversion, and a line for each file of `out` that is durable
    out/      the files written so far; becomes the target
    old/      what --overwrite replaces: whole, since it comes and goes by one rename
    trash/    what is being removed: never renamed back

A run goes from each of these states to the next by one rename, and may end in any of them. The next
run begins with `recover`, which looks at what lies there and at nothing else:

    target   old      out       a run ended                        recover
    ------   ------   -------   --------------------------------   ------------------------------
    before   -        partial   while it copied                    -  (the journal says what counts)
    before   -        whole     before target -> old               -
    -        before   whole     before out -> target               renames old -> target
    after    before   -         before old -> trash                renames old -> trash, removes it
    after    -        -         while it removed the rest          removes trash

So the target is missing only between two renames, and what comes back is whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from parammap.checkpoint.manifest import MANIFEST, Manifest
from parammap.errors import RefusedError, TaskError, naming, said
from parammap.execute.durable import sync, write
from parammap.execute.writer import Outcome
from parammap.job.journal import Journal

#: how long the lock of a run that was killed may still be held, by workers that are about to end
GRACE_SECONDS = 2.0
#: what link(2) says where the file system has no hard links, or no more of this file
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class Staging:
    """A context: where it ends, the lock is free again, and an error of the system is one line,
    RefusedError before any file of the output was begun and TaskError after."""

    def __init__(self, target: Path, overwrite: bool) -> None:
        self.target, self.overwrite = target, overwrite
        self.folder = target.parent / f".{target.name}.parammap"
        self.out, self.old, self.trash, self.lock = (
            self.folder / name for name in ("out", "old", "trash", "lock")
        )
        self.journal = Journal(self.folder / "journal")
        self.has_begun = False
        self._locked: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        if self._locked is not None:
            os.close(self._locked)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            if self.has_begun:
                raise TaskError(said(error, self.folder)) from error
            raise RefusedError(f"{said(error, self.folder)}; nothing was written") from error

    def recover(self) -> None:
        """Put in order what a run that was killed left. Raises RefusedError if another run is at
        work here, or if somebody else has put something in the place of what is to come back."""
        if not self.folder.is_dir():
            return
        self._acquire()
        _remove(self.trash)
        if not self.old.is_dir():
            return
        if not self.out.is_dir() and self.target.is_dir():
            os.rename(self.old, self.trash)
            _remove(self.trash)
        elif has_content(self.target):
            raise RefusedError(
                f"{self.target}: has content, and {self.old} is what was there before an earlier "
                "run; move one of them away"
            )
        else:
            os.rename(self.old, self.target)

    def open(self, fingerprint: str) -> dict[str, Outcome]:
        """Lock the staging folder and return what an earlier, killed run of the same conversion
        finished."""
        self._acquire()
        done = {
            path: outcome
            for path, outcome in self.journal.outcomes(fingerprint).items()
            if (self.out / path).is_file() and (self.out / path).stat().st_size == outcome.nbytes
        }
        if not done:
            try:
                _remove(self.out)
                self.out.mkdir()
                self.journal.begin(fingerprint)
            except OSError:
                self.discard()
                raise
        self.has_begun = True
        return done

    def _acquire(self) -> None:
        """Lock the folder; a lock that no process holds is taken over."""
        deadline = time.monotonic() + GRACE_SECONDS
        while self._locked is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # removed by the run that ends there
                self._locked = _locked(self.lock)
            if self._locked is None:
                if time.monotonic() > deadline:
                    holder = self.lock.read_text(errors="replace")[:200] or "unknown"
                    raise RefusedError(
                        f"{self.target}: another conversion into it is running ({holder}); wait "
                        "for it to end"
                    )
                time.sleep(0.05)

    def link(self, links: Iterable[tuple[str, str]]) -> str:
        """Make `link` a second name of `existing`, or a copy where the file system has no hard
        links; says which."""
        how = "none"
        for link, existing in links:
            (self.out / link).unlink(missing_ok=True)
            how = _link(self.out / existing, self.out / link)
        return how

    def adopt(self, paths: Iterable[str]) -> None:
        """Give files that the target holds a place in the new one as well; publishing then replaces
        the target."""
        for path in paths:
            (self.out / path).unlink(missing_ok=True)
            _link(self.target / path, self.out / path)
            self.overwrite = True

    def publish(self, manifest: Manifest) -> list[str]:
        """Write the manifest, make everything durable, and rename the whole into place; says what
        is left to be removed."""
        with naming(self.out / MANIFEST):
            manifest.write(self.out)
        for folder, _, _ in os.walk(self.out):
            sync(folder)
        with ExitStack() as undo:
            if self.overwrite and has_content(self.target):
                os.rename(self.target, self.old)
                undo.callback(os.rename, self.old, self.target)
            os.rename(self.out, self.target)
            undo.callback(os.rename, self.target, self.out)
            sync(self.target.parent)
            undo.pop_all()
        return self.discard()

    def discard(self) -> list[str]:
        """Remove the folder and all that lies in it, the lock last; says if something is left."""
        try:
            if self.old.is_dir():
                os.rename(self.old, self.trash)
            for entry in os.scandir(self.folder):
                if entry.name != self.lock.name:
                    _remove(Path(entry.path))
            self.lock.unlink(missing_ok=True)
            self.folder.rmdir()
        except OSError as error:
            return [f"{self.folder}: cannot be removed ({error.strerror}); remove it yourself"]
        return []


def has_content(folder: Path) -> bool:
    """Whether something lies in a folder, if it is there."""
    return folder.is_dir() and any(folder.iterdir())


def _locked(path: Path) -> int | None:
    """A descriptor of the file at `path`, made and locked; None if another process has locked it,
    or removed it meanwhile."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with naming(path):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.ftruncate(descriptor, 0)
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                write(
                    descriptor,
                    f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode(),
                )
                return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _link(existing: Path, link: Path) -> str:
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(existing, link)
        return "hard links"
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    shutil.copyfile(existing, link)
    sync(link)
    return "copies"


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all that lies in it, if it is there."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        error.filename = str(path)  # of what lies in a folder, rmtree names the last part only
        raise
