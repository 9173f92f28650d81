"""One conversion from end to end: read, plan, execute, judge, publish."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from . import __version__, frameworks
from .checkpoint import Checkpoint
from .checks import STALE, Misfit, tell_permuted
from .errors import RefusedError
from .execute import BUFFER_BYTES, Outcome, run_tasks
from .frameworks import megatron_target, mindspore
from .naming import brief
from .plan import Output, Plan, Planner
from .progress import Progress
from .publish import Staging, check_target, published
from .tensors import MODEL_WEIGHT, WEIGHT, Tensor

#: measured private memory of a worker beyond its buffers: the interpreter's and numpy's own pages
_WORKER_BYTES = 12 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for. `sizes` are the layout wanted of the output, `source_sizes` what the user says of the
    source's, where named."""

    source: Path
    target: Path
    to: str = "mindspore"
    sizes: dict[str, int] = field(default_factory=dict)
    source_sizes: dict[str, int] = field(default_factory=dict)
    source_suffix: str | None = None
    noop: frozenset[int] = frozenset()
    stage_layers: tuple[int, ...] = ()
    num_layers: int | None = None
    output: mindspore.Options = mindspore.Options()
    iteration: int | None = None
    sidecar: Path | None = None
    weights_only: bool = False
    drop: frozenset[str] = frozenset()
    accept_stale: bool = False
    accept_permuted: bool = False
    overwrite: bool = False
    dry_run: bool = False
    verbose: bool = False
    workers: int = 2
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it. Exit status 0, or 1 where differences were found and are listed.

    `converted` pairs each rank's folder in the source with its file in the output.
    """

    status: int
    lines: list[str]
    converted: list[tuple[Path, str]] = field(default_factory=list)


def convert(request: Request) -> Report:
    """Run the conversion. Raises RefusedError (nothing written) or TaskError (nothing published)."""
    source = frameworks.read(request.source, iteration=request.iteration, sidecar=request.sidecar,
                             weights_only=request.weights_only, drop=request.drop, sizes=request.source_sizes,
                             noop=request.noop, suffix=request.source_suffix)
    _check_layout(source, request)
    planned = TARGETS[request.to](source, request)
    plan = Planner(source.index, {WEIGHT: MODEL_WEIGHT}).plan(planned.files)
    dropped = _dropped(source, plan, request)
    if request.verbose:
        print("\n".join(f"{task.path}: {spec.name} {list(spec.shape)} {spec.dtype}"
                        for task in plan.tasks for spec in task.specs))
    if request.dry_run:
        return Report(0, _describe(source, plan, request))
    fingerprint = _fingerprint(plan, request)
    before = published(request.target, fingerprint)
    if before and not request.overwrite:
        status = _status([misfit["kind"] for misfit in before["misfits"]], before["replicas_that_differ"], request)
        return Report(status, [f"{request.target}: holds the result of this very conversion already"], planned.converted)
    check_target(request.target, request.overwrite, [request.source, *([request.sidecar] if request.sidecar else [])])
    request.target.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    staging = Staging(request.target, fingerprint, request.overwrite)
    outcomes = _execute(plan, staging, request)
    misfits = _judge(source, outcomes, request, staging)
    linked = staging.link(planned.links)
    digests, differing = _digests(outcomes)
    status = _status([misfit.kind for misfit in misfits], differing, request)
    staging.publish({
        "parammap": __version__, "status": status, "source": str(source.folder), "iteration": source.iteration,
        "framework": {"from": source.framework, "to": request.to}, "layout": asdict(source.layout),
        "files": [{"path": o.path, "bytes": o.nbytes} for o in outcomes], "links": linked,
        "dropped": dropped, "misfits": _misfit_entries(misfits), "replicas_that_differ": differing,
        "options": {"weights_only": request.weights_only, "drop": sorted(request.drop), "cast": request.output.cast},
        "digests": digests, "scalars": _scalars(plan), **planned.notes})
    return Report(status, _summary(plan, request, misfits, differing, dropped, time.monotonic() - started),
                  planned.converted)


def _to_mindspore(source: Checkpoint, request: Request) -> Output:
    return mindspore.output(source, replace(request.output, dp=request.sizes.get("dp"), cp=request.sizes.get("cp")))


def _to_megatron(source: Checkpoint, request: Request) -> Output:
    for name in ("dp", "cp"):
        if request.sizes.get(name, getattr(source.layout, name)) != getattr(source.layout, name):
            raise RefusedError(f"{source.folder}: was saved with {name} {getattr(source.layout, name)}; another needs a "
                               "change of layout, which is not built yet: leave the size out")
    return megatron_target.output(source)


TARGETS = {"mindspore": _to_mindspore, "megatron": _to_megatron}


def _check_layout(source: Checkpoint, request: Request) -> None:
    for name, wanted in request.sizes.items():
        there = getattr(source.layout, name)
        if name not in ("dp", "cp") and wanted != there:
            raise RefusedError(f"{source.folder}: was saved with {name} {there}; {name} {wanted} needs a change of layout, "
                               "which is not built yet: leave the size out")
    if request.num_layers not in (None, source.num_layers):
        raise RefusedError(f"{source.folder}: has {source.num_layers} layers and not {request.num_layers}; "
                           "leave the number out")
    unknown = set(request.output.roles) - source.index.roles()
    if unknown and not request.weights_only:
        raise RefusedError(f"{source.folder}: holds no optimizer state called {', '.join(sorted(unknown))}, only "
                           f"{', '.join(sorted(source.index.roles()))}")
    if request.stage_layers:
        stages = source.stage_layers()
        if list(request.stage_layers) != stages:
            raise RefusedError(f"{source.folder}: its stages hold {stages} layers and not {list(request.stage_layers)}; "
                               "leave the list out")


def _dropped(source: Checkpoint, plan: Plan, request: Request) -> list[str]:
    """What of the source is not in the output, all of it by the user's own word."""
    unasked = [name for name in plan.unused if name.rsplit("(", 1)[1][:-1] in request.output.roles]
    if unasked:
        raise RefusedError(f"{source.folder}: {len(unasked)} tensors would go nowhere: {brief(unasked)}")
    return source.dropped + plan.unused


def _execute(plan: Plan, staging: Staging, request: Request) -> list[Outcome]:
    done = staging.open()
    try:
        left = [task for task in plan.tasks if task.path not in done]
        _check_space(plan, sum(task.nbytes for task in left), staging)
    except RefusedError:
        staging.discard()
        raise
    progress = Progress(sum(task.streamed for task in plan.tasks), sum(t.streamed for t in plan.tasks if t.path in done))
    for outcome in run_tasks(left, staging.out, min(request.workers, len(left)) or 1, progress, request.timeout):
        staging.record(outcome)
        done[outcome.path] = outcome
        progress.show()
    progress.show(last=True)
    return [done[task.path] for task in plan.tasks]


def _check_space(plan: Plan, needed: int, staging: Staging) -> None:
    free = shutil.disk_usage(staging.folder).free
    if needed > free:
        raise RefusedError(f"{staging.folder.parent}: has {free / 1e9:.2f} GB free and the output needs "
                           f"{needed / 1e9:.2f} GB more; make room or choose another place")


def _judge(source: Checkpoint, outcomes: list[Outcome], request: Request, staging: Staging) -> list[Misfit]:
    """The misfits of all files, told apart; refuses permuted ones unless they are accepted."""
    misfits: dict[Tensor, Misfit] = {}
    for outcome in outcomes:
        for tensor, misfit in outcome.misfits.items():
            if misfits.setdefault(tensor, misfit) is not misfit:
                misfits[tensor].merge(misfit)
    names = {tensor.name for tensor in misfits}
    tell_permuted(list(misfits.values()), {
        tensor.name: [piece for pieces in source.index.boxes[tensor].values() for piece in pieces]
        for tensor in source.index.boxes if tensor.role == MODEL_WEIGHT and tensor.name in names})
    refused = [m for m in misfits.values() if m.kind != STALE]
    if refused and not request.accept_permuted:
        staging.discard()
        raise RefusedError(
            f"{source.folder}: in {len(refused)} tensors the optimizer holds other values than the model, moments and all "
            f"({_told(refused)}): a wrong sidecar, or a defect of the release that saved it; convert --weights-only, or "
            "--accept-permuted if you know better")
    return list(misfits.values())


def _told(misfits: list[Misfit]) -> str:
    shown = "; ".join(f"{m.tensor.name} is {m.kind}" + (f" with {m.permuted_with}" if m.permuted_with else "")
                      for m in misfits[:4])
    return shown + ("; …" if len(misfits) > 4 else "")


def _status(kinds: list[str], differing: list[str], request: Request) -> int:
    accepted = all(request.accept_stale if kind == STALE else request.accept_permuted for kind in kinds)
    return 0 if accepted and not differing else 1


def _digests(outcomes: list[Outcome]) -> tuple[list[dict], list[str]]:
    """The digest of each logical tensor, and the names of those of which some rank keeps another copy."""
    sums: dict[Tensor, dict[int, tuple[int, int]]] = {}
    for outcome in outcomes:
        for (tensor, replica), (digest, count) in outcome.digests.items():
            known = sums.setdefault(tensor, {}).get(replica, (0, 0))
            sums[tensor][replica] = (known[0] + digest) & (1 << 64) - 1, known[1] + count
    entries, differing = [], []
    for tensor, replicas in sums.items():
        whole = {digest for digest, count in replicas.values() if count == tensor.rows * tensor.cols}
        if len(whole) > 1:
            differing.append(f"{tensor.name} ({tensor.role})")
        entries.append({"role": tensor.role, "name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape),
                        "digest": f"{replicas[0][0]:016x}",
                        "digests_of_other_copies": [f"{other:016x}" for other in sorted(whole - {replicas[0][0]})]})
    return entries, sorted(differing)


def _scalars(plan: Plan) -> list[dict]:
    """The tensors whose content was known before the run, in hexadecimal, with the files that hold these very ones."""
    files: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for task in plan.tasks:
        values = tuple((spec.name, spec.data.hex()) for spec in task.specs if spec.data is not None)
        if values:
            files.setdefault(values, []).append(task.path)
    return [{"files": paths, "values": dict(values)} for values, paths in files.items()]


def _fingerprint(plan: Plan, request: Request) -> str:
    """What makes a conversion this one: the sources' files as they are now, and every option that shapes the output."""
    files = sorted({copy.file for task in plan.tasks for copies in task.copies for copy in copies if copy.file})
    stats = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in files]
    layout = [(task.path, task.nbytes, len(task.specs)) for task in plan.tasks]
    options = [str(request.output), request.to, request.weights_only, sorted(request.drop)]
    literals = hashlib.sha256(b"".join(s.data for t in plan.tasks for s in t.segments if hasattr(s, "data")))
    return hashlib.sha256(json.dumps([__version__, stats, layout, options, literals.hexdigest()]).encode()).hexdigest()


def _misfit_entries(misfits: list[Misfit]) -> list[dict]:
    return [{"tensor": m.tensor.name, "kind": m.kind, "elements": m.count,
             "holds": m.permuted_with, "first": [{"row": r, "column": c, "cast_weight": a, "model_weight": b}
                                                 for r, c, a, b in m.positions]} for m in misfits]


def _describe(source: Checkpoint, plan: Plan, request: Request) -> list[str]:
    workers = min(request.workers, len(plan.tasks))
    lines = [f"{source.folder}: iteration {source.iteration}, {source.layout}, {len(source.index.boxes)} logical tensors"]
    lines += [f"  {request.target / task.path}  {task.nbytes:,} bytes, {len(task.specs)} tensors" for task in plan.tasks]
    read = sum(task.bytes_read for task in plan.tasks)
    memory = workers * (_WORKER_BYTES + 8 * BUFFER_BYTES)
    parent = next(folder for folder in request.target.absolute().parents if folder.exists())
    lines.append(f"reads {read / 1e9:.3f} GB, writes {plan.nbytes / 1e9:.3f} GB in {len(plan.tasks)} files "
                 f"({shutil.disk_usage(parent).free / 1e9:.1f} GB of disk free); {workers} workers need about "
                 f"{memory / 1e6:.0f} MB of memory beside the interpreter; nothing was written")
    return lines


def _summary(plan: Plan, request: Request, misfits: list[Misfit], differing: list[str], dropped: list[str],
             seconds: float) -> list[str]:
    lines = [f"{m.tensor.name}: {m.count} elements are {m.kind} (first at row {m.positions[0][0]}, column "
             f"{m.positions[0][1]}: optimizer {m.positions[0][2]:g}, model {m.positions[0][3]:g})" for m in misfits]
    if differing:
        lines.append(f"{brief(differing)}: the ranks' copies differ; each rank kept its own")
    if dropped:
        lines.append(f"left out: {brief(dropped)}")
    lines.append(f"{request.target}: {len(plan.tasks)} files, {plan.nbytes / 1e9:.2f} GB in {seconds:.1f} s "
                 f"({plan.nbytes / 1e9 / max(seconds, 1e-9):.2f} GB/s); every element written once and checked")
    return lines
