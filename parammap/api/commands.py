"""What the commands convert, verify, diff and digest do, as functions that return values."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from parammap.api.checkpoint import Checkpoint, source_of
from parammap.checkpoint.manifest import TensorDigest
from parammap.frameworks.options import options_of
from parammap.job import conversion
from parammap.job.request import Report, Request
from parammap.plan.planner import REFUSE
from parammap.proof import diff as comparison
from parammap.proof import verify as proof
from parammap.proof.diff import Comparison
from parammap.proof.digests import tensor_digests
from parammap.proof.verify import Verdict


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    iteration: int | None = None,
    sidecar: str | Path | None = None,
    metadata_from: str | Path | None = None,
    weights_only: bool = False,
    drop: Collection[str] = (),
    keep_foreign_objects: Collection[str] = (),
    tp: int | None = None,
    pp: int | None = None,
    vpp: int | None = None,
    ep: int | None = None,
    etp: int | None = None,
    cp: int | None = None,
    dp: int | None = None,
    stage_layers: Sequence[int] = (),
    make_vocab_size_divisible_by: int | None = None,
    replicas: str = REFUSE,
    accept_stale: bool = False,
    accept_permuted: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int = 1,
    ray: str | None = None,
    progress: bool = False,
    **options: object,
) -> Report:
    """Write a checkpoint for another framework, or in another parallel layout: `parammap convert
    SOURCE TARGET --to …`, whose flags the arguments are; `options` are those that only some
    frameworks have, such as dtype="float16" or format="safetensors".

    Sizes that are left out stay the source's. `progress` shows on standard error how far it is;
    else nothing is printed. With `workers` of more than one, processes are forked.

    Raises RefusedError where input or arguments are not usable (nothing was written), and TaskError
    where a task failed (nothing was published, and the same call goes on from there). The report's
    status is 1 where differences were found, which its lines list."""
    sizes = {"tp": tp, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp, "cp": cp, "dp": dp}
    return conversion.convert(
        Request(
            source=Path(source),
            target=Path(target),
            to=to,
            options=options_of(to, options, weights_only=weights_only),
            sizes={name: size for name, size in sizes.items() if size is not None},
            stage_layers=tuple(stage_layers),
            vocab_divisible_by=make_vocab_size_divisible_by,
            replicas=replicas,
            iteration=iteration,
            sidecar=Path(sidecar) if sidecar else None,
            metadata_from=Path(metadata_from) if metadata_from else None,
            weights_only=weights_only,
            drop=frozenset(drop),
            keep_foreign_objects=frozenset(keep_foreign_objects),
            accept_stale=accept_stale,
            accept_permuted=accept_permuted,
            overwrite=overwrite,
            dry_run=dry_run,
            workers=workers,
            ray=ray,
            quiet=not progress,
        )
    )


def verify(
    output: str | Path,
    against: str | Path | None = None,
    *,
    iteration: int | None = None,
    sidecar: str | Path | None = None,
    metadata_from: str | Path | None = None,
    output_metadata_from: str | Path | None = None,
    weights_only: bool = False,
    drop: Collection[str] = (),
    cast: str | None = None,
    replicas: bool = False,
    workers: int = 1,
) -> Verdict:
    """Read an output again and prove it by the digests of its manifest, and, `against` its source,
    element by element: `parammap verify`, whose flags the arguments are.

    The output is right if the verdict has no `problems`. Raises RefusedError if it or the source is
    no checkpoint, or nothing could be compared."""
    return proof.verify(
        proof.Verification(
            output=Path(output),
            against=Path(against) if against else None,
            iteration=iteration,
            sidecar=Path(sidecar) if sidecar else None,
            metadata_from=Path(metadata_from) if metadata_from else None,
            output_metadata_from=Path(output_metadata_from) if output_metadata_from else None,
            weights_only=weights_only,
            drop=frozenset(drop),
            cast=cast,
            replicas=replicas,
            workers=workers,
        )
    )


def diff(
    a: str | Path | Checkpoint,
    b: str | Path | Checkpoint,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    workers: int = 1,
) -> Comparison:
    """Compare two checkpoints of any framework and layout, element by element: bit by bit, or by
    |a - b| <= atol + rtol · |b|. Open a checkpoint to say how it is to be read.

    Raises RefusedError if one is no checkpoint, or they have no element in common."""
    return comparison.diff(source_of(a), source_of(b), rtol, atol, workers)


def digest(checkpoint: str | Path | Checkpoint, *, workers: int = 1) -> list[TensorDigest]:
    """The digest of each logical tensor, the same in every framework, layout and file format.

    Raises RefusedError if it is no checkpoint, or damaged."""
    return tensor_digests(source_of(checkpoint).index, workers)
