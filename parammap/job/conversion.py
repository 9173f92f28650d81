"""One conversion from end to end: read, plan, execute, judge, publish."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parammap.checkpoint import extra_states
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.manifest import Choices, Manifest
from parammap.errors import RefusedError, TaskError
from parammap.execute.cluster import run_tasks_on_ray
from parammap.execute.gather import BUFFER_BYTES
from parammap.execute.gc_pause import gc_paused
from parammap.execute.local import run_tasks
from parammap.execute.progress import Progress
from parammap.execute.writer import STRIP_BYTES, Outcome
from parammap.formats import allowed, zip_records
from parammap.frameworks import registry
from parammap.frameworks.flags import DTYPE
from parammap.job.findings import Findings, status_of
from parammap.job.fingerprint import fingerprint
from parammap.job.own_output import held_to_manifest
from parammap.job.partial_run import PartialRun, partial_run_of
from parammap.job.request import Report, Request
from parammap.job.resume import intact
from parammap.job.source_files import SourceFiles
from parammap.job.staging import Staging
from parammap.job.target import check_target, published
from parammap.plan.plan import FileTask, Output, Plan
from parammap.plan.planner import OWN, Planner
from parammap.tensors.arrangement import PADDING
from parammap.tensors.logical import MAIN_PARAM, MODEL_PARAM
from parammap.tensors.names import shorten_names
from parammap.version import __version__

#: measured private memory of a worker beyond its buffers: the interpreter's and numpy's own pages
_WORKER_BYTES = 12 << 20


def convert(request: Request) -> Report:
    """Run the conversion. Raises RefusedError (nothing written) or TaskError (nothing
    published)."""
    with Staging(request.target, request.overwrite) as staging:
        if not request.dry_run:
            staging.recover()
        return _convert(request, staging)


def _convert(request: Request, staging: Staging) -> Report:
    with (
        gc_paused(),
        allowed.keeping(request.keep_foreign_objects),
        zip_records.noting() as archives,
    ):
        source, target, planned, part, plan = _planned(request)
    dropped = _dropped(source, plan, planned, request)
    if request.verbose:
        print(
            "\n".join(
                f"{task.path}: {spec.name} {list(spec.shape)} {spec.dtype}"
                for task in plan.tasks
                for spec in task.specs
            )
        )
    if request.dry_run:
        return Report(0, _describe(source, target, plan, request))
    sources = SourceFiles.of(
        plan.sources(), archives, (source.folder, request.sidecar, request.metadata_from)
    )
    this = fingerprint(plan, _shaping(planned, request))
    done = None if request.overwrite else published(request.target, this)
    if done:
        left = staging.discard() if staging.folder.is_dir() else []
        return Report(
            _status_before(done, request),
            [f"{request.target}: holds the result of this very conversion already", *left],
            planned.converted,
        )
    check_target(
        request.target,
        request.overwrite or part.before is not None,
        [request.source, *([request.sidecar] if request.sidecar else [])],
        apart=not request.beside_source,
    )
    started = time.monotonic()
    outcomes = _execute(plan, staging, this, request)
    findings = Findings(source.index, outcomes, part.before)
    try:
        checked = [
            sources.check_checksums(outcomes, request.workers),
            *held_to_manifest(source.folder, source.iteration, findings.digests, plan.sources()),
        ]
        sources.check_unchanged()
        if refusal := findings.refusal(source.folder, request):
            raise refusal
        if check := registry.target(request.to).check:
            check(staging.out, target)
    except (RefusedError, TaskError):
        staging.discard()
        raise
    links = [link for link in planned.links if (staging.out / link[1]).exists()]
    linked = staging.link(links)
    staging.adopt(part.kept)
    status = findings.status(request)
    before = part.before
    files, checksums = _written(outcomes, links, part)
    manifest = Manifest(
        parammap=__version__,
        status=status,
        source=str(source.folder),
        iteration=source.iteration,
        from_framework=source.framework,
        to_framework=request.to,
        layout=asdict(target.layout),
        source_layout=asdict(source.trained or source.layout),
        whole=part.whole,
        is_whole=part.is_last,
        fingerprints=(*(before.fingerprints if before else ()), this),
        files=files,
        crc32=checksums,
        links=linked,
        dropped=tuple(dropped),
        options=Choices(
            weights_only=request.weights_only,
            drop=tuple(sorted(request.drop)),
            cast=getattr(_options(request), DTYPE.option, None),
            replicas=request.replicas,
        ),
        **findings.entries(),
        scalars=tuple(_scalars(plan)),
        notes=planned.notes,
    )
    left = staging.publish(manifest)
    lines = [
        *target.notes,
        *findings.lines(request),
        *checked,
        *_replicas(plan),
        *_summary(plan, request, dropped, started),
        *left,
    ]
    return Report(status, lines, planned.converted)


def _written(
    outcomes: list[Outcome], links: list[tuple[str, str]], part: PartialRun
) -> tuple[dict[str, int], dict[str, int]]:
    """The size and the checksum of each file of the output."""
    sizes = {outcome.path: outcome.nbytes for outcome in outcomes}
    checksums = {outcome.path: outcome.crc32 for outcome in outcomes}
    for known, before in (
        (sizes, part.before.files if part.before else {}),
        (checksums, part.before.crc32 if part.before else {}),
    ):
        known |= {link: known[existing] for link, existing in links if existing in known}
        known |= {path: value for path, value in before.items() if path in part.kept}
    return sizes, checksums


def _planned(request: Request) -> tuple[Checkpoint, Checkpoint, Output, PartialRun, Plan]:
    """The source, the same in the layout wanted, its files, those of this run, and how to write
    them."""
    source = registry.read(
        request.source,
        iteration=request.iteration,
        sidecar=request.sidecar,
        weights_only=request.weights_only,
        drop=request.drop,
        sizes=request.source_sizes,
        noop=request.noop,
        suffix=request.source_suffix,
        metadata_from=request.metadata_from,
        ema=request.ema,
    )
    _check(source, request)
    target, chosen = _wanted(source, request), registry.target(request.to)
    planned = chosen.files(target, _options(request), request.sizes)
    part = partial_run_of(planned, request)
    replicas = OWN if target is source and chosen.resharded else request.replicas
    return (
        source,
        target,
        planned,
        part,
        Planner(source.index, {MAIN_PARAM: MODEL_PARAM}, replicas).plan(part.files),
    )


def _wanted(source: Checkpoint, request: Request) -> Checkpoint:
    """The source in the layout wanted. Raises RefusedError for sizes that mean nothing to the
    target."""
    target = registry.target(request.to)
    if target.resharded is None and (
        request.stage_layers or not request.sizes.keys() <= target.sizes.keys()
    ):
        raise RefusedError(
            f"--to {request.to}: its files are the same for every layout; leave the sizes out"
        )
    return target.wanted(
        source, _options(request), request.sizes, request.stage_layers, request.vocab_divisible_by
    )


def _check(source: Checkpoint, request: Request) -> None:
    contradictions = registry.framework(source.framework).contradictions(source)
    for names, what in contradictions.items():
        raise RefusedError(f"{source.folder}: {names}: {what}")
    if request.num_layers not in (None, source.num_layers):
        raise RefusedError(
            f"{source.folder}: has {source.num_layers} layers and not {request.num_layers}; "
            "leave the number out"
        )
    if request.source_stage_layers and list(request.source_stage_layers) != source.stage_layers():
        raise RefusedError(
            f"{source.folder}: its stages hold {source.stage_layers()} layers and not "
            f"{list(request.source_stage_layers)}; leave the list out"
        )


def _dropped(source: Checkpoint, plan: Plan, planned: Output, request: Request) -> list[str]:
    """What of the source is not in the output: tensors by the user's own word, and the extra states
    of layers."""
    if request.only_tp or request.only_pp:
        return source.dropped
    unasked = [
        name
        for name in plan.unused
        if name.rsplit("(", 1)[1][:-1] in planned.states
        and not name.split(" ")[0].endswith(f".{PADDING}")
        and name.split(" ")[0] not in planned.ignorable
    ]
    if unasked:
        raise RefusedError(
            f"{source.folder}: {len(unasked)} tensors would go nowhere: {shorten_names(unasked)}"
        )
    kept = set(planned.extra_states)
    left_behind = [
        name for name in map(str, extra_states.filled(source.structures)) if name not in kept
    ]
    return source.dropped + plan.unused + left_behind


def _execute(plan: Plan, staging: Staging, this: str, request: Request) -> list[Outcome]:
    done = intact(staging.open(this), staging.out, request.workers)
    try:
        left = [task for task in plan.tasks if task.path not in done]
        _check_space(plan, sum(task.nbytes for task in left), staging)
        progress = Progress(
            sum(task.streamed for task in plan.tasks),
            sum(t.streamed for t in plan.tasks if t.path in done),
            is_quiet=request.quiet,
        )
        outcomes = _begin(left, staging.out, progress, request)
    except RefusedError:
        if not done:
            staging.discard()
        raise
    for outcome in outcomes:
        staging.journal.record(outcome)
        done[outcome.path] = outcome
        progress.show()
    progress.show(last=True)
    return [done[task.path] for task in plan.tasks]


def _begin(
    tasks: list[FileTask], folder: Path, progress: Progress, request: Request
) -> Iterator[Outcome]:
    if request.ray and tasks:
        return run_tasks_on_ray(request.ray, tasks, folder, progress, request.timeout)
    return run_tasks(
        tasks, folder, min(request.workers, len(tasks)) or 1, progress, request.timeout
    )


def _check_space(plan: Plan, needed: int, staging: Staging) -> None:
    free = shutil.disk_usage(staging.folder).free
    if needed > free:
        raise RefusedError(
            f"{staging.folder.parent}: has {free / 1e9:.2f} GB free and the output needs "
            f"{needed / 1e9:.2f} GB more; make room or choose another place"
        )


def _options(request: Request) -> Any:
    return request.options or registry.target(request.to).options()


def _shaping(planned: Output, request: Request) -> list[object]:
    """What shapes the output beside the plan."""
    return [
        request.to,
        _options(request),
        request.weights_only,
        sorted(request.drop),
        request.replicas,
        planned.links,
    ]


def _status_before(manifest: Manifest, request: Request) -> int:
    return status_of(
        {misfit["kind"] for misfit in manifest.misfits},
        request,
        bool(manifest.replicas_that_differ or manifest.overflown),
    )


def _scalars(plan: Plan) -> list[dict[str, Any]]:
    """The tensors whose content was known before the run, in hexadecimal, with the files that hold
    these very ones."""
    files: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for task in plan.tasks:
        values = tuple((spec.name, spec.data.hex()) for spec in task.specs if spec.data is not None)
        if values:
            files.setdefault(values, []).append(task.path)
    return [{"files": paths, "values": dict(values)} for values, paths in files.items()]


def _describe(source: Checkpoint, target: Checkpoint, plan: Plan, request: Request) -> list[str]:
    workers = min(request.workers, len(plan.tasks))
    lines = [
        f"{source.folder}: iteration {source.iteration}, {source.trained or source.layout}, "
        f"{len(source.index.shards)} logical tensors"
    ]
    if target is not source:
        lines += [
            f"laid out anew: {target.layout}, layers per stage {target.stage_layers()}",
            *target.notes,
        ]
    lines += [
        f"  {request.target / task.path}  {task.nbytes:,} bytes, {len(task.specs)} tensors"
        for task in plan.tasks
    ]
    read = sum(task.bytes_read for task in plan.tasks)
    memory = workers * (_WORKER_BYTES + 8 * BUFFER_BYTES + _strips(plan) * STRIP_BYTES)
    parent = next(folder for folder in request.target.absolute().parents if folder.exists())
    lines.append(
        f"reads {read / 1e9:.3f} GB, writes {plan.nbytes / 1e9:.3f} GB in {len(plan.tasks)} files "
        f"({shutil.disk_usage(parent).free / 1e9:.1f} GB of disk free); {workers} workers need "
        f"about "
        f"{memory / 1e6:.0f} MB of memory beside the interpreter; nothing was written"
    )
    return lines


def _strips(plan: Plan) -> int:
    """How many strips of what lies in another order than it is written a worker holds at once."""
    return any(fill.is_turned for task in plan.tasks for fills in task.fills for fill in fills)


def _replicas(plan: Plan) -> Iterator[str]:
    """Says how many tensors had copies that were compared."""
    repeated = {
        fill.tensor for task in plan.tasks for fills in task.fills for fill in fills if fill.others
    }
    if repeated:
        yield f"{len(repeated)} tensors are kept by several ranks: all copies were compared, and the first one's taken"


def _summary(plan: Plan, request: Request, dropped: list[str], started: float) -> list[str]:
    lines, seconds = (
        [f"left out: {shorten_names(dropped)}"] if dropped else [],
        time.monotonic() - started,
    )
    lines.append(
        f"{request.target}: {len(plan.tasks)} files, {plan.nbytes / 1e9:.2f} GB in {seconds:.1f} s "
        f"({plan.nbytes / 1e9 / max(seconds, 1e-9):.2f} GB/s); every element written once and "
        f"checked"
    )
    return lines
