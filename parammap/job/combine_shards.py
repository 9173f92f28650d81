"""The shards of MindSpeed-Core-MS's distributed optimizer, one file per data parallel group."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from parammap.checkpoint.index import Index
from parammap.errors import RefusedError, TaskError
from parammap.execute.local import run_tasks
from parammap.execute.progress import Progress
from parammap.frameworks.mindspore import sharded
from parammap.frameworks.mindspore.formats import FORMATS
from parammap.job.fingerprint import fingerprint
from parammap.job.resume import intact
from parammap.job.staging import Staging
from parammap.job.target import check_writable
from parammap.plan.plan import FileTask, Plan, Wanted, WantedFile
from parammap.plan.planner import Planner
from parammap.tensors.layout import Layout
from parammap.tensors.logical import Stored, TensorSpec
from parammap.tensors.names import shorten_names

#: with --no-save-optim, entries without a dot whose names contain one of these are left out too
_OPTIMIZER_SCALARS = ("learning_rate", "weight_decay", "epoch", "state", "default_generator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """What a user asks for: the groups described below `strategy_dir` (whose first rank is in
    `ranks`, if that is given), of the files of `checkpoint_dir` in format `source_format`, into
    `output_dir` in `target_format`. `for_all_ranks`: a link for each other rank of a group."""

    strategy_dir: Path
    checkpoint_dir: Path
    output_dir: Path
    source_format: str = "ckpt"
    target_format: str = "ckpt"
    ranks: tuple[int, int] | None = None
    for_all_ranks: bool = False
    weights_only: bool = False
    workers: int = 2


@dataclass(frozen=True, slots=True)
class _Group:
    """One data parallel group: its output file, the other ranks' copies of it as (link, file), what
    to tell of it."""

    file: WantedFile
    links: list[tuple[str, str]]
    lines: list[str]


def combine(request: Combination) -> list[str]:
    """Write each group's file, all or none, and say what each holds. Raises RefusedError (nothing
    was written) or TaskError (nothing was added to the output folder)."""
    groups = [_group(request, rank, path) for rank, path in _strategies(request).items()]
    tasks = Planner(Index([], Layout())).plan([group.file for group in groups]).tasks
    links = [link for group in groups for link in group.links]
    outputs = [task.path for task in tasks] + [link for link, _ in links]
    _check_free(request.output_dir, outputs)
    _execute(request, tasks, links, outputs)
    return [line for group in groups for line in group.lines]


def _strategies(request: Combination) -> dict[int, Path]:
    first, end = request.ranks or (0, sys.maxsize)
    if first >= end:
        raise RefusedError(
            f"--rank-section: {first} {end} is empty; END is the first rank that is left out"
        )
    found = {
        rank: path
        for rank, path in sharded.strategy_files(request.strategy_dir).items()
        if first <= rank < end
    }
    if not found:
        section = f" of ranks {first} to {end - 1}" if request.ranks else ""
        raise RefusedError(
            f"{request.strategy_dir}: holds no rank_N/dist_opt_shard_info_rank_N-0_0.json{section}; "
            f"name "
            "the folder that the training run wrote with --strategy-dir"
        )
    return found


def _group(request: Combination, rank: int, path: Path) -> _Group:
    strategy = sharded.read_strategy(path, rank)
    prefixes = sharded.PREFIXES[:1] if request.weights_only else sharded.PREFIXES
    combined = sharded.combined(
        strategy, request.checkpoint_dir, prefixes, (f".{request.source_format}",)
    )
    others = {
        name: stored
        for name, stored in combined.others.items()
        if not (request.weights_only and _is_of_optimizer(name))
    }
    tensors = tuple(_wanted(name, stored) for name, stored in (combined.states | others).items())
    name = f"{combined.files[rank].stem}{sharded.MERGED}.{request.target_format}"
    file = WantedFile(
        f"rank_{rank}/{name}",
        tuple(FORMATS[request.target_format].frame([one.spec for one in tensors])),
        tensors,
    )
    own = re.compile(rf"(?<![A-Za-z])rank_{rank}(?!\d)")
    links = [
        (f"rank_{other}/{own.sub(f'rank_{other}', name)}", file.path)
        for other in strategy.ranks
        if other != rank and request.for_all_ranks
    ]
    lines = [
        f"{request.output_dir / file.path}: {len(tensors)} tensors of {len(strategy.ranks)} ranks"
    ]
    lines += [f"{request.output_dir / link}: the same" for link, _ in links]
    lines += [
        f"  left out: {shorten_names(names)}: {why}"
        for names, why in (
            (combined.repeated, "the buckets hold them in full precision"),
            (combined.strings, "text"),
        )
        if names
    ]
    return _Group(file, links, lines)


def _is_of_optimizer(name: str) -> bool:
    return (
        name.startswith(sharded.PREFIXES[1:])
        or "." not in name
        and any(k in name for k in _OPTIMIZER_SCALARS)
    )


def _wanted(name: str, stored: Stored) -> Wanted:
    return Wanted(TensorSpec(name, stored.dtype, stored.shape), source=stored)


def _check_free(folder: Path, outputs: list[str]) -> None:
    for path in outputs:
        if (folder / path).exists():
            raise RefusedError(
                f"{folder / path}: exists already and is never replaced; move it away"
            )


def _execute(
    request: Combination,
    tasks: list[FileTask],
    links: list[tuple[str, str]],
    outputs: list[str],
) -> None:
    """Write all files into a staging folder inside the output folder, then move them to their
    places."""
    name = "_".join([tasks[0].path.split("/")[0], f"{len(tasks)}{sharded.MERGED}"])
    check_writable(request.output_dir / name)
    with Staging(request.output_dir / name, overwrite=False) as staging:
        done = intact(staging.open(fingerprint(Plan(tasks))), staging.out, request.workers)
        left = [task for task in tasks if task.path not in done]
        _check_space(request.output_dir, sum(task.nbytes for task in left), staging)
        progress = Progress(
            sum(task.streamed for task in tasks),
            sum(task.streamed for task in tasks if task.path in done),
        )
        for outcome in run_tasks(left, staging.out, min(request.workers, len(left)) or 1, progress):
            staging.journal.record(outcome)
            progress.show()
        progress.show(last=True)
        staging.link(links)
        _move(staging.out, request.output_dir, outputs)
        staging.discard()


def _check_space(folder: Path, needed: int, staging: Staging) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        staging.discard()
        raise RefusedError(
            f"{folder}: has {free / 1e9:.2f} GB free and the output needs {needed / 1e9:.2f} GB "
            "more; make room or choose another place"
        )


def _move(staged: Path, folder: Path, outputs: list[str]) -> None:
    """Rename every file into place, or none."""
    _check_free(folder, outputs)
    moved: list[str] = []
    try:
        for path in outputs:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.rename(staged / path, folder / path)
            moved.append(path)
    except OSError as error:
        for path in moved:
            os.rename(folder / path, staged / path)
        raise TaskError(f"{folder / outputs[len(moved)]}: {error.strerror}") from error
