"""What Yuan-2.0's split_tp, merge_tp and merge_pp tools do, in one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.frameworks import registry
from parammap.frameworks.megatron import reader
from parammap.frameworks.megatron.facts import args_of
from parammap.frameworks.megatron.files import OPTIMIZER_FILE
from parammap.job.conversion import convert
from parammap.job.request import Report, Request
from parammap.plan.planner import REFUSE

#: what a user may say of the model, which is checked
NUMBERS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repartition:
    """What a user asks for. `sizes` and `target_sizes` are tp and pp of source and output, where
    named, `stage_layers` and `target_stage_layers` the layers of their stages; `numbers` are those
    of NUMBERS, and target_num_layers, that were given. `only_tp` and `only_pp` are the ranks to
    write (None: all)."""

    source: Path
    target: Path
    sizes: Mapping[str, int] = field(default_factory=dict)
    target_sizes: Mapping[str, int] = field(default_factory=dict)
    stage_layers: tuple[int, ...] = ()
    target_stage_layers: tuple[int, ...] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)
    only_tp: tuple[int, ...] | None = None
    only_pp: tuple[int, ...] | None = None
    weights_only: bool = False
    replicas: str = REFUSE
    workers: int = 2
    overwrite: bool = False
    dry_run: bool = False


def repartition(request: Repartition) -> Report:
    """Write the checkpoint in other partitions. Raises RefusedError (nothing was written) or
    TaskError (nothing was published)."""
    source = registry.read(request.source, weights_only=True, sizes=dict(request.sizes))
    _check(request, source)
    there = {"tp": source.layout.tp, "pp": source.layout.pp}
    wanted = {**there, **request.target_sizes}
    without = not any(
        (folder / OPTIMIZER_FILE).is_file() for folder in source.rank_folders.values()
    )
    report = convert(
        Request(
            source=request.source,
            target=request.target,
            to="megatron",
            sizes=wanted,
            source_sizes=dict(request.sizes),
            stage_layers=request.target_stage_layers,
            source_stage_layers=request.stage_layers,
            only_pp=_only(request.only_pp, there["pp"], wanted["pp"]),
            only_tp=_only(request.only_tp, there["tp"], wanted["tp"]),
            weights_only=request.weights_only or without,
            replicas=request.replicas,
            workers=request.workers,
            overwrite=request.overwrite,
            dry_run=request.dry_run,
        )
    )
    if not without:
        return report
    note = f"{request.source}: no {OPTIMIZER_FILE} there: the weights alone"
    return replace(report, lines=[note, *report.lines])


def _check(request: Repartition, source: Checkpoint) -> None:
    saved = args_of(source.common_metadata)
    known = {name: saved.get(name) for name in NUMBERS} | {"target_num_layers": source.num_layers}
    for name, number in known.items():
        if number not in (None, given := request.numbers.get(name, number)):
            raise RefusedError(
                f"{request.source}: --{name.replace('_', '-')} is {number} there and not {given}; "
                "leave it out"
            )
    if not request.weights_only and reader.has_undistributed_optimizer(source):
        raise RefusedError(
            f"{request.source}: its optimizer is not a distributed one; --no-load-optim leaves it "
            "behind"
        )


def _only(named: tuple[int, ...] | None, source: int, target: int) -> frozenset[int]:
    """The ranks to write, empty for all."""
    if named is None or set(named) == set(range(source)):
        return frozenset()
    if source != target or not set(named) < set(range(source)):
        raise RefusedError(
            f"{','.join(map(str, named))}: no part of 0 to {source - 1}, or these are not the "
            f"output's 0 to {target - 1}: name all of the source's, or none"
        )
    return frozenset(named)
