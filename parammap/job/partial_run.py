"""Conversions in parts: the files of some ranks at a time, into one folder, which the last part
makes whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from parammap.checkpoint.manifest import Manifest, read_whole
from parammap.errors import RefusedError
from parammap.job.fingerprint import program
from parammap.job.request import Request
from parammap.plan.plan import Output, WantedFile
from parammap.tensors.layout import Place


@dataclass(frozen=True, slots=True)
class PartialRun:
    """`files` are written by this run, `kept` by earlier ones of the same conversion, whose
    manifest is `before`. `whole` stands for the conversion of which all are parts, and `is_last` if
    nothing of it is missing after this run."""

    files: list[WantedFile]
    kept: list[str]
    before: Manifest | None
    whole: str
    is_last: bool


def partial_run_of(output: Output, request: Request) -> PartialRun:
    """The part that a request names, all if it names none. Raises RefusedError if it names no rank
    of the output, and for a damaged manifest of earlier parts."""
    whole = _identity(output, request)
    if not (request.only_tp or request.only_pp):
        return PartialRun(output.files, [], None, whole, True)
    chosen = [file for file in output.files if file.place is None or _is_named(file.place, request)]
    if not any(file.place for file in chosen):
        raise RefusedError(
            f"{request.target}: has no ranks tp {sorted(request.only_tp)} pp "
            f"{sorted(request.only_pp)}; name ranks of the output"
        )
    before = None if request.overwrite else read_whole(request.target)
    before = before if before and before.whole == whole else None
    there = before.files if before else {}
    kept = sorted(file.path for file in output.files if file not in chosen and file.path in there)
    is_last = all(file in chosen or file.path in there for file in output.files)
    return PartialRun(
        [file for file in chosen if is_last or not file.completes], kept, before, whole, is_last
    )


def _is_named(place: Place, request: Request) -> bool:
    return (not request.only_tp or place.tp in request.only_tp) and (
        not request.only_pp or place.pp in request.only_pp
    )


def _identity(output: Output, request: Request) -> str:
    files = [
        (file.path, sum(segment.nbytes for segment in file.segments))
        for file in output.files
        if file.place
    ]
    what = [
        program(),
        str(Path(request.source).resolve()),
        request.to,
        str(request.options),
        request.weights_only,
        request.replicas,
    ]
    return hashlib.sha256(json.dumps([what, files]).encode()).hexdigest()
