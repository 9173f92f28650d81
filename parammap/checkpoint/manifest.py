"""The manifest of an output, `parammap_manifest.json`: what was converted, from what, with which
findings, and the digests and checksums by which the output is proved.

Its form is parammap/schemas/manifest.schema.json, in words docs/manifest.md; nothing but this module
writes or reads it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from parammap import families
from parammap.errors import RefusedError
from parammap.formats import json_document
from parammap.formats.json_schema import Check, compiled

MANIFEST = "parammap_manifest.json"
#: what is written. Those of 2 have no checksums. Manifests of ParamMap 0.1 do not say their version:
#: in 1 the output's files say their ranks in the output's own layout (`says_ranks`), in 0 in the
#: source's
VERSION = 3
#: the checksum of the manifest itself
_CHECKSUM = "sha256"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDigest:
    """The digest of a logical tensor, 16 hexadecimal digits (docs/proving.md), the same in every
    framework, layout and file format; `others` are those of ranks' copies that differ from the
    first one. In a manifest it may be of some of the `elements` only, where the others are still to
    come."""

    state: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    others: tuple[str, ...] = ()
    elements: int | None = None

    def to_json(self) -> dict[str, Any]:
        of_part = self.elements is not None
        return {
            "role": self.state,
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "digest": self.digest,
            **({} if of_part else {"digests_of_other_copies": list(self.others)}),
            **({"elements": self.elements} if of_part else {}),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> TensorDigest:
        return cls(
            state=entry["role"],
            name=families.renamed(entry["name"]),
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            digest=entry["digest"],
            others=tuple(entry.get("digests_of_other_copies", ())),
            elements=entry.get("elements"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The user's choices that say which tensors an output has, in which dtype: the states left out
    by name, the dtype that weights were cast to (None: their own), and what was done about copies
    that differ."""

    weights_only: bool = False
    drop: tuple[str, ...] = ()
    cast: str | None = None
    replicas: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`parammap` is the program's version and `status` its exit status; `source` the folder that
    was read, of framework `from_framework` in `source_layout`.

    `whole` stands for the conversion of which this may be a part, `is_whole` says whether nothing of
    it is missing, and `fingerprints` are those of its parts so far. `files` are sizes in bytes by
    path below the folder, and `crc32` the checksums of those files (of none before version 3); they
    find accidents and no forger, and cost little, as archives need them anyway. `links` says how
    further names of files were made. `dropped` names what of the source is not in the output.

    `misfits`, `replicas_merged`, `not_finite` and `overflown` are findings by tensor, for people to
    read; `replicas_that_differ` names tensors. `digests` are of what was read, `digests_of_casts` of
    what casts made of it, `digests_of_parts` of tensors that are not yet whole. `scalars` are
    tensors whose content was known before the run, in hexadecimal, by the files that hold them.
    `notes` are what the target framework adds, by keys of its own. `version` is the form's."""

    parammap: str
    status: int
    source: str
    iteration: int
    from_framework: str
    to_framework: str
    layout: Mapping[str, Any]
    source_layout: Mapping[str, Any]
    whole: str
    is_whole: bool
    fingerprints: tuple[str, ...]
    files: Mapping[str, int]
    crc32: Mapping[str, int]
    links: str
    dropped: tuple[str, ...]
    options: Choices
    misfits: tuple[dict[str, Any], ...]
    replicas_merged: tuple[dict[str, Any], ...]
    not_finite: tuple[dict[str, Any], ...]
    overflown: tuple[dict[str, Any], ...]
    replicas_that_differ: tuple[str, ...]
    digests: tuple[TensorDigest, ...]
    digests_of_casts: tuple[TensorDigest, ...]
    digests_of_parts: tuple[TensorDigest, ...]
    scalars: tuple[dict[str, Any], ...]
    notes: Mapping[str, Any]
    version: int = VERSION

    @property
    def keeps_ranks_of_source(self) -> bool:
        """Whether its files may say ranks of the source's layout, in which the output's is
        another."""
        return self.version < 1 and self.layout != self.source_layout

    def write(self, folder: Path) -> None:
        """Write it into a folder, durably."""
        with open(folder / MANIFEST, "w") as file:
            file.write(json.dumps(self.to_json(), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def to_json(self) -> dict[str, Any]:
        content = self._content()
        return content if self.version < 3 else content | {_CHECKSUM: _checksum(content)}

    def _content(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "parammap": self.parammap,
            "status": self.status,
            "source": self.source,
            "iteration": self.iteration,
            "framework": {"from": self.from_framework, "to": self.to_framework},
            "layout": dict(self.layout),
            "source_layout": dict(self.source_layout),
            "whole": self.whole,
            "is_whole": self.is_whole,
            "fingerprints": list(self.fingerprints),
            "files": [
                {"path": path, "bytes": nbytes}
                | ({"crc32": f"{self.crc32[path]:08x}"} if path in self.crc32 else {})
                for path, nbytes in self.files.items()
            ],
            "links": self.links,
            "dropped": list(self.dropped),
            "options": asdict(self.options) | {"drop": list(self.options.drop)},
            **{name: list(getattr(self, name)) for name in _FINDINGS},
            **{name: [one.to_json() for one in getattr(self, name)] for name in _DIGESTS},
            "scalars": list(self.scalars),
            **self.notes,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Manifest:
        """Of any version that is known, and of its form; the fields of `_LATER` may be missing from
        one of 0.1. Raises ValueError for one that does not fit its own checksum."""
        rest = {**_LATER, **content}
        version, checksum = content.get("version", 0), rest.pop(_CHECKSUM, None)
        if version and (checksum or version >= 3) and checksum != _checksum(content):
            raise ValueError("it does not fit its own checksum")
        says_ranks, framework, options = (
            rest.pop(name) for name in ("says_ranks", "framework", "options")
        )
        known: dict[str, Any] = {
            "from_framework": framework["from"],
            "to_framework": framework["to"],
            "version": rest.pop("version", 1 if says_ranks else 0),
            "crc32": {
                file["path"]: int(file["crc32"], 16) for file in rest["files"] if "crc32" in file
            },
            "files": {file["path"]: file["bytes"] for file in rest.pop("files")},
            "options": Choices(**options | {"drop": tuple(options.get("drop", ()))}),
            **{name: rest.pop(name) for name in _AS_IT_IS},
            **{name: tuple(rest.pop(name)) for name in _LISTS},
            **{name: tuple(map(TensorDigest.from_json, rest.pop(name))) for name in _DIGESTS},
        }
        if not all(isinstance(note, dict) for note in rest.values()):
            raise TypeError(f"it has an unknown field among {', '.join(rest)}")
        return cls(**known, notes=rest)


_AS_IT_IS = (
    "parammap",
    "status",
    "source",
    "iteration",
    "layout",
    "source_layout",
    "whole",
    "is_whole",
    "links",
)
_FINDINGS = ("misfits", "replicas_merged", "not_finite", "overflown", "replicas_that_differ")
_LISTS = ("fingerprints", "dropped", "scalars", *_FINDINGS)
_DIGESTS = ("digests", "digests_of_casts", "digests_of_parts")
#: what ParamMap 0.1 came to write after its first manifests
_LATER: dict[str, Any] = {
    "says_ranks": False,
    "options": {},
    "fingerprints": (),
    "whole": "",
    "overflown": (),
    "scalars": (),
    "digests_of_parts": (),
}


def _checksum(content: Mapping[str, Any]) -> str:
    """The SHA-256, in hexadecimal, of a manifest's other fields: as JSON without spaces, the keys
    sorted."""
    others = {name: value for name, value in content.items() if name != _CHECKSUM}
    text = json.dumps(others, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


_IS_VERSIONED = compiled(
    {"type": "object", "properties": {"version": {"type": "integer", "minimum": 0}}}
)


@cache
def _check_of(version: int) -> Check:
    """The check of a manifest: by today's form, of which parts may be missing from an earlier
    one."""
    form = json_document.schema("manifest")
    properties = form["properties"]
    if version < 3:
        form["required"].remove(_CHECKSUM)
        properties["files"]["items"]["required"].remove("crc32")
        properties["version"] = {"const": version}
    if version < 2:
        form["required"] = [name for name in form["required"] if name not in {"version", *_LATER}]
        properties["says_ranks"] = {"type": "boolean"}
        properties["options"]["required"] = []
    return compiled(form)


def read(path: Path) -> Manifest | None:
    """The manifest in a file; None if there is no such file. Raises RefusedError if it is damaged,
    or newer than what is known here."""
    if not path.is_file():
        return None
    content = json_document.read(path, _IS_VERSIONED, "convert again")
    if content.get("version", 0) > VERSION:
        raise RefusedError(
            f"{path}: is of version {content['version']}, and this program knows up to "
            f"{VERSION}; use the ParamMap that wrote it ({content.get('parammap')})"
        )
    try:
        _check_of(content.get("version", 0))(content)
        return Manifest.from_json(content)
    except ValueError as error:
        raise RefusedError(f"{path}: is damaged ({error}); convert again") from error


def read_whole(folder: Path) -> Manifest | None:
    """The manifest of a folder in which all the files lie that it names; None without. Raises
    RefusedError as `read` does."""
    manifest = read(folder / MANIFEST)
    if manifest is None:
        return None
    sizes = {path: _size(folder / path) for path in manifest.files}
    return manifest if sizes == manifest.files else None


def find(output: Path) -> tuple[Path, Manifest] | None:
    """The manifest of an output, of the save folder of which it is an iteration, or of the one file
    that it is, with the folder that its paths begin at; None if there is none. Raises RefusedError
    as `read` does."""
    candidates = (
        (output, MANIFEST),
        (output.parent, MANIFEST),
        (output.parent, f"{output.stem}.{MANIFEST}"),
    )
    for root, name in candidates:
        manifest = read(root / name)
        if manifest is not None and (root == output or _names(manifest, output)):
            return root, manifest
    return None


def _names(manifest: Manifest, output: Path) -> bool:
    """Whether a manifest beside an output is of it: of a folder in which files lie, or of a file
    alone."""
    if output.is_dir():
        return any(Path(path).parts[0] == output.name for path in manifest.files)
    return list(manifest.files) == [output.name] and manifest.is_whole


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
