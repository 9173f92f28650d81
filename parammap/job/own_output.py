"""A source that an earlier conversion wrote is held to its manifest: to the digests, which the
copier takes again anyway, and to the checksums of small files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from parammap.checkpoint import manifest as manifests
from parammap.checkpoint.manifest import MANIFEST, Manifest, TensorDigest
from parammap.errors import TaskError
from parammap.execute.source_checksums import crc32_of
from parammap.proof.files import wrong_scalars
from parammap.tensors.names import shorten_names

#: a file of metadata; larger ones hold tensors, which have digests
_SMALL_NBYTES = 16 << 20


@dataclass(slots=True)
class _Compared:
    """The tensors that are as the manifest says, and those that are not; `moved` of these are what
    it says of another one."""

    equal: list[TensorDigest] = field(default_factory=list)
    wrong: list[TensorDigest] = field(default_factory=list)
    moved: int = 0

    def is_rewritten(self, is_later: bool) -> bool:
        """Whether a framework trained on and saved again: that leaves no tensor as it was, or, of a
        model that is frozen in part, goes with another iteration."""
        if is_later:
            return bool(self.wrong)
        return len(self.wrong) > 1 and not self.equal and not self.moved


def held_to_manifest(
    folder: Path, iteration: int, digests: list[TensorDigest], read: set[str]
) -> Iterator[str]:
    """Say how far a source, of this iteration, is what its manifest says; nothing where it has
    none. `digests` are of what was copied, `read` the files from which it came.

    Raises TaskError for one that is damaged, or put together from several."""
    found = manifests.find(folder)
    if found is None:
        return
    root, manifest = found
    compared = _compared(manifest, digests)
    if compared.is_rewritten(iteration > manifest.iteration):
        yield (
            f"{root}: was written again since ParamMap made it: {len(compared.wrong)} tensors, all "
            f"but {len(compared.equal)}, are not as {MANIFEST} says, so nothing was held to that"
        )
        return
    wrong = [f"{one.name} ({one.state})" for one in compared.wrong]
    wrong += _wrong_files(folder, root, manifest, read)
    wrong += [f"{problem}" for problem in wrong_scalars(root, manifest)]
    if wrong:
        raise TaskError(
            f"{root}: {len(wrong)} of its contents are not as its {MANIFEST} says "
            f"({shorten_names(wrong)}): damaged, exchanged, or changed since; copy the folder again,"
            f" or remove {MANIFEST} if the change is meant"
        )
    if compared.equal:
        yield f"{len(compared.equal)} tensors of the source are as its {MANIFEST} says"


def _compared(manifest: Manifest, digests: list[TensorDigest]) -> _Compared:
    known = {
        (one.state, one.name, one.dtype, one.shape): {one.digest, *one.others}
        for one in (*manifest.digests, *manifest.digests_of_casts)
    }
    every, compared = set().union(*known.values()), _Compared()
    for one in digests:
        expected = known.get((one.state, one.name, one.dtype, one.shape))
        if expected is None:
            continue
        if {one.digest, *one.others} <= expected:
            compared.equal.append(one)
        else:
            compared.wrong.append(one)
            compared.moved += one.digest in every
    return compared


def _wrong_files(folder: Path, root: Path, manifest: Manifest, read: set[str]) -> Iterator[str]:
    """Small files of the source, beside those of which the tensors came, that are other than when
    they were written; without those that training goes on to write."""
    for name, crc in manifest.crc32.items():
        path, nbytes = root / name, manifest.files[name]
        if nbytes > _SMALL_NBYTES or str(path) in read:
            continue
        if not path.is_relative_to(folder) or path.name.startswith("latest"):
            continue
        if path.is_file() and (path.stat().st_size != nbytes or crc32_of(path) != crc):
            yield name
