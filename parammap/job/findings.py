"""What was found while copying: misfits, copies that differ, digests; what is refused for it, and
what the manifest says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from parammap.checkpoint.index import Index
from parammap.errors import RefusedError
from parammap.execute.checks import STALE, Misfit, NonFinite, Overflown, Unequal, tell_permuted
from parammap.execute.writer import Outcome
from parammap.job.request import Request
from parammap.name_list import shorten_names
from parammap.plan.planner import REFUSE
from parammap.tensors.logical import MODEL_PARAM, Tensor


class Findings:
    """The outcomes of all files, put together, with what the manifest of earlier parts of the
    conversion says (`before`).

    `misfits`, `unequal`, `non_finite` and `overflown` are by tensor; `digests` are the manifest's
    entries, `written` those of tensors as a cast made them, and `partial` those of which elements
    are still to come; `differing` names the tensors of which ranks kept copies of their own that
    differ."""

    def __init__(
        self, index: Index, outcomes: Iterable[Outcome], before: dict | None = None
    ) -> None:
        self.misfits: dict[Tensor, Misfit] = {}
        self.unequal: dict[Tensor, Unequal] = {}
        self.non_finite: dict[Tensor, NonFinite] = {}
        self.overflown: dict[Tensor, Overflown] = {}
        self.before = before or {}
        sums = _sums(self.before)
        for outcome in outcomes:
            for known, found in (
                (self.misfits, outcome.misfits),
                (self.unequal, outcome.unequal),
                (self.non_finite, outcome.non_finite),
                (self.overflown, outcome.overflown),
            ):
                for tensor, one in found.items():
                    if known.setdefault(tensor, one) is not one:
                        known[tensor].merge(one)
            for (tensor, replica), (digest, count) in outcome.digests.items():
                before = sums.setdefault(tensor, {}).get(replica, (0, 0))
                sums[tensor][replica] = (before[0] + digest) & (1 << 64) - 1, before[1] + count
        entries, self.partial, self.differing = _digests(sums)
        read = {(tensor.role, tensor.name, tensor.dtype) for tensor in index.shards}
        self.digests, self.written = (
            [
                entry
                for entry in entries
                if ((entry["role"], entry["name"], entry["dtype"]) in read) == was_read
            ]
            for was_read in (True, False)
        )
        names = {tensor.name for tensor in self.misfits}
        tell_permuted(
            list(self.misfits.values()),
            {
                tensor.name: [shard for shards in index.shards[tensor].values() for shard in shards]
                for tensor in index.shards
                if tensor.role == MODEL_PARAM and tensor.name in names
            },
        )

    def refusal(self, folder: Path, request: Request) -> RefusedError | None:
        """Why nothing may be published, or None."""
        wrong = [misfit for misfit in self.misfits.values() if misfit.kind != STALE]
        if wrong and not request.accept_permuted:
            return RefusedError(
                f"{folder}: in {len(wrong)} tensors the optimizer holds other values than the "
                f"model, moments and all "
                f"({_told(wrong)}): a wrong sidecar, or a defect of the release that saved it; "
                f"convert --weights-only, or "
                "--accept-permuted if you know better"
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
                    f"{one.tensor.name} ({one.tensor.role}): {one.count} elements {what}, first at "
                    f"row {row}, "
                    f"column {column}{''.join(f' ({number:.9g})' for number in value)} in {file}"
                )
        if self.differing:
            lines.append(
                f"{shorten_names(self.differing)}: the ranks' copies differ; each rank kept its own"
            )
        return lines

    def entries(self) -> dict[str, object]:
        """The manifest's share."""
        return {
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
            ]
            + self.before.get("misfits", []),
            "replicas_merged": [
                {
                    "tensor": one.tensor.name,
                    "role": one.tensor.role,
                    "elements": one.count,
                    "first": [
                        {"row": r, "column": c, "taken": a, "other": b, "file": file}
                        for r, c, a, b, file in one.positions
                    ],
                }
                for one in self.unequal.values()
            ]
            + self.before.get("replicas_merged", []),
            "not_finite": [
                {
                    "tensor": one.tensor.name,
                    "role": one.tensor.role,
                    "elements": one.count,
                    "first": [
                        {"row": r, "column": c, "file": file} for r, c, file in one.positions
                    ],
                }
                for one in self.non_finite.values()
            ]
            + self.before.get("not_finite", []),
            "overflown": [
                {
                    "tensor": one.tensor.name,
                    "role": one.tensor.role,
                    "elements": one.count,
                    "first": [
                        {"row": r, "column": c, "value": value, "file": file}
                        for r, c, value, file in one.positions
                    ],
                }
                for one in self.overflown.values()
            ]
            + self.before.get("overflown", []),
            "replicas_that_differ": self.differing,
            "digests": self.digests,
            "digests_of_casts": self.written,
            "digests_of_parts": self.partial,
        }


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
        f"{one.tensor.name} ({one.tensor.role}): {one.count} elements differ, first at row {row}, "
        f"column {column}: "
        f"{first:.9g} and {other:.9g} in {file}"
    )


#: by logical tensor and replica, the digest and the number of elements that it is of
_Sums = dict[Tensor, dict[int, tuple[int, int]]]


def _sums(manifest: dict) -> _Sums:
    sums: _Sums = {}
    for entry in (
        entry
        for key in ("digests", "digests_of_casts", "digests_of_parts")
        for entry in manifest.get(key, [])
    ):
        tensor = Tensor(entry["role"], entry["name"], entry["dtype"], tuple(entry["shape"]))
        sums[tensor] = {
            0: (int(entry["digest"], 16), entry.get("elements", tensor.rows * tensor.cols))
        }
    return sums


def _digests(sums: _Sums) -> tuple[list[dict], list[dict], list[str]]:
    """The digest of each logical tensor that was copied whole; of the others, as far as they were;
    and the names of those of which some rank keeps another."""
    entries, partial, differing = [], [], []
    for tensor, replicas in sums.items():
        known = {
            "role": tensor.role,
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
        }
        whole = {
            replica: digest
            for replica, (digest, count) in replicas.items()
            if count == tensor.rows * tensor.cols
        }
        if 0 in whole:
            others = sorted(set(whole.values()) - {whole[0]})
            differing += [f"{tensor.name} ({tensor.role})"] if others else []
            entries.append(
                {
                    **known,
                    "digest": f"{whole[0]:016x}",
                    "digests_of_other_copies": [f"{other:016x}" for other in others],
                }
            )
        elif 0 in replicas:
            partial.append(
                {**known, "digest": f"{replicas[0][0]:016x}", "elements": replicas[0][1]}
            )
    return entries, partial, sorted(set(differing))
