"""What was found while copying: misfits, copies that differ, digests; what is refused for it, and
what the manifest says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from parammap.checkpoint.index import Index
from parammap.checkpoint.manifest import Manifest, TensorDigest
from parammap.errors import RefusedError
from parammap.execute.checks import (
    STALE,
    Found,
    Misfit,
    NonFinite,
    Overflown,
    Unequal,
    tell_permuted,
)
from parammap.execute.writer import Outcome
from parammap.job.request import Request
from parammap.plan.planner import REFUSE
from parammap.tensors.logical import MODEL_PARAM, LogicalTensor
from parammap.tensors.names import shorten_names


class Findings:
    """The outcomes of all files, put together, with what the manifest of earlier parts of the
    conversion says (`before`).

    `misfits`, `unequal`, `non_finite` and `overflown` are by tensor; `digests` are the manifest's
    entries, `written` those of tensors as a cast made them, and `partial` those of which elements
    are still to come; `differing` names the tensors of which ranks kept copies of their own that
    differ."""

    def __init__(
        self, index: Index, outcomes: Iterable[Outcome], before: Manifest | None = None
    ) -> None:
        self.misfits: dict[LogicalTensor, Misfit] = {}
        self.unequal: dict[LogicalTensor, Unequal] = {}
        self.non_finite: dict[LogicalTensor, NonFinite] = {}
        self.overflown: dict[LogicalTensor, Overflown] = {}
        self.before = before
        sums = _sums(before)
        for outcome in outcomes:
            _add(self.misfits, outcome.misfits)
            _add(self.unequal, outcome.unequal)
            _add(self.non_finite, outcome.non_finite)
            _add(self.overflown, outcome.overflown)
            for (tensor, replica), (digest, count) in outcome.digests.items():
                total, counted = sums.setdefault(tensor, {}).get(replica, (0, 0))
                sums[tensor][replica] = (total + digest) & (1 << 64) - 1, counted + count
        entries, self.partial, self.differing = _digests(sums)
        read = {(tensor.state, tensor.name, tensor.dtype) for tensor in index.shards}
        self.digests, self.written = (
            [
                entry
                for entry in entries
                if ((entry.state, entry.name, entry.dtype) in read) == was_read
            ]
            for was_read in (True, False)
        )
        names = {tensor.name for tensor in self.misfits}
        tell_permuted(
            list(self.misfits.values()),
            {
                tensor.name: [shard for shards in index.shards[tensor].values() for shard in shards]
                for tensor in index.shards
                if tensor.state == MODEL_PARAM and tensor.name in names
            },
        )

    def refusal(self, folder: Path, request: Request) -> RefusedError | None:
        """Why nothing may be published, or None."""
        wrong = [misfit for misfit in self.misfits.values() if misfit.kind != STALE]
        if wrong and not request.accept_permuted:
            return RefusedError(
                f"{folder}: in {len(wrong)} tensors the optimizer holds other values than the "
                f"model, moments and all ({_told(wrong)}): a wrong sidecar, or a defect of the "
                "release that saved it; convert --weights-only, or --accept-permuted if you know "
                "better"
            )
        if self.unequal and request.replicas == REFUSE:
            return RefusedError(
                f"{folder}: ranks keep different copies of {len(self.unequal)} tensors, of which "
                f"another layout needs one "
                f"({'; '.join(map(_position, list(self.unequal.values())[:4]))}); choose with "
                f"--replicas first or mean"
            )
        return None

    def status(self, request: Request) -> int:
        return status_of(
            {misfit.kind for misfit in self.misfits.values()},
            request,
            bool(self.differing or self.overflown),
        )

    def lines(self, request: Request) -> list[str]:
        """What of it a user should read."""
        lines = [
            f"{m.tensor.name}: {m.count} elements are {m.kind} (first at row {m.positions[0][0]}, "
            f"column "
            f"{m.positions[0][1]}: optimizer {m.positions[0][2]:g}, model {m.positions[0][3]:g})"
            for m in self.misfits.values()
        ]
        lines += [
            f"{_position(one)}: took "
            f"{'the mean' if request.replicas == 'mean' else 'the first rank’s'}"
            for one in self.unequal.values()
        ]
        for kinds, what in (
            (self.non_finite, "are not finite"),
            (self.overflown, "became infinite in float16"),
        ):
            for one in kinds.values():
                row, column, *value, file = one.positions[0]
                lines.append(
                    f"{one.tensor.name} ({one.tensor.state}): {one.count} elements {what}, first at "
                    f"row {row}, "
                    f"column {column}{''.join(f' ({number:.9g})' for number in value)} in {file}"
                )
        if self.differing:
            lines.append(
                f"{shorten_names(self.differing)}: the ranks' copies differ; each rank kept its own"
            )
        return lines

    def entries(self) -> dict[str, Any]:
        """The manifest's share, with the findings of earlier parts after this one's."""
        found: dict[str, list[dict[str, Any]]] = {
            "misfits": [
                {
                    "tensor": m.tensor.name,
                    "kind": m.kind,
                    "elements": m.count,
                    "holds": m.permuted_with,
                    "first": [
                        {"row": r, "column": c, "cast_weight": a, "model_weight": b}
                        for r, c, a, b in m.positions
                    ],
                }
                for m in self.misfits.values()
            ],
            "replicas_merged": _entries(self.unequal, ("taken", "other", "file")),
            "not_finite": _entries(self.non_finite, ("file",)),
            "overflown": _entries(self.overflown, ("value", "file")),
        }
        return {
            **{
                name: (*entries, *(getattr(self.before, name) if self.before else ()))
                for name, entries in found.items()
            },
            "replicas_that_differ": tuple(self.differing),
            "digests": tuple(self.digests),
            "digests_of_casts": tuple(self.written),
            "digests_of_parts": tuple(self.partial),
        }


def _entries(
    found: Mapping[LogicalTensor, Unequal | NonFinite | Overflown], fields: tuple[str, ...]
) -> list[dict[str, Any]]:
    """A manifest's entries; `fields` is what a position says beside row and column."""
    return [
        {
            "tensor": one.tensor.name,
            "role": one.tensor.state,
            "elements": one.count,
            "first": [
                dict(zip(("row", "column", *fields), position, strict=True))
                for position in one.positions
            ],
        }
        for one in found.values()
    ]


def _add(known: dict[LogicalTensor, Found], found: Mapping[LogicalTensor, Found]) -> None:
    for tensor, one in found.items():
        if known.setdefault(tensor, one) is not one:
            known[tensor].merge(one)


def status_of(kinds: set[str], request: Request, others: bool) -> int:
    """The exit status of a conversion with misfits of these kinds, and `others` where more was
    found that needs a look."""
    accepted = all(
        request.accept_stale if kind == STALE else request.accept_permuted for kind in kinds
    )
    return 0 if accepted and not others else 1


def _told(misfits: list[Misfit]) -> str:
    shown = "; ".join(
        f"{m.tensor.name} is {m.kind}" + (f" with {m.permuted_with}" if m.permuted_with else "")
        for m in misfits[:4]
    )
    return shown + ("; …" if len(misfits) > 4 else "")


def _position(one: Unequal) -> str:
    row, column, first, other, file = one.positions[0]
    return (
        f"{one.tensor.name} ({one.tensor.state}): {one.count} elements differ, first at row {row}, "
        f"column {column}: {first:.9g} and {other:.9g} in {file}"
    )


#: stands for the replica that an earlier part of the conversion copied whole; its other copies
#: follow downwards, as the replicas of each part count from 0
_EARLIER = -1
#: by logical tensor and replica, the digest and the number of elements that it is of
_Sums = dict[LogicalTensor, dict[int, tuple[int, int]]]


def _sums(manifest: Manifest | None) -> _Sums:
    known = (
        (*manifest.digests, *manifest.digests_of_casts, *manifest.digests_of_parts)
        if manifest
        else ()
    )
    sums: _Sums = {}
    for one in known:
        tensor = LogicalTensor(one.state, one.name, one.dtype, one.shape)
        if one.elements is not None:
            sums[tensor] = {0: (int(one.digest, 16), one.elements)}
        else:
            sums[tensor] = {
                _EARLIER - number: (int(digest, 16), tensor.rows * tensor.cols)
                for number, digest in enumerate((one.digest, *one.others))
            }
    return sums


def _digests(sums: _Sums) -> tuple[list[TensorDigest], list[TensorDigest], list[str]]:
    """The digest of each logical tensor that was copied whole; of the others, as far as they were;
    and the names of those of which some rank keeps another."""
    entries, partial, differing = [], [], []
    for tensor, replicas in sums.items():
        whole = {
            replica: digest
            for replica, (digest, count) in replicas.items()
            if count == tensor.rows * tensor.cols
        }
        first = next((number for number in (_EARLIER, 0) if number in whole), None)
        if first is not None:
            others = sorted(set(whole.values()) - {whole[first]})
            differing += [f"{tensor.name} ({tensor.state})"] if others else []
            told = tuple(f"{other:016x}" for other in others)
            entries.append(_digest(tensor, whole[first], others=told))
        elif 0 in replicas:
            digest, elements = replicas[0]
            partial.append(_digest(tensor, digest, elements=elements))
    return entries, partial, sorted(set(differing))


def _digest(tensor: LogicalTensor, digest: int, **rest: Any) -> TensorDigest:
    return TensorDigest(
        state=tensor.state,
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        digest=f"{digest:016x}",
        **rest,
    )
