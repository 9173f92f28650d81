"""What a user asks of a conversion, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parammap.errors import RefusedError
from parammap.plan.planner import FIRST, MEAN, REFUSE

#: what a user can have made of copies that ranks keep and that differ
REPLICAS = (REFUSE, FIRST, MEAN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for. `sizes` are the layout wanted of the output, `source_sizes` what the
    user says of the source's, where named, and likewise `stage_layers` and `source_stage_layers`.
    `only_tp` and `only_pp` name the output's ranks to write (empty: all); `options` are those of
    the target framework (None: its defaults). `beside_source`: the output may lie in the source's
    folder, whose files are known by their names. `quiet`: no progress is shown.

    Raises RefusedError for a size or number of workers below 1, and for what is no choice."""

    source: Path
    target: Path
    to: str
    sizes: dict[str, int] = field(default_factory=dict)
    source_sizes: dict[str, int] = field(default_factory=dict)
    source_stage_layers: tuple[int, ...] = ()
    source_suffix: str | None = None
    noop: frozenset[int] = frozenset()
    stage_layers: tuple[int, ...] = ()
    vocab_divisible_by: int | None = None
    num_layers: int | None = None
    only_tp: frozenset[int] = frozenset()
    only_pp: frozenset[int] = frozenset()
    options: Any = None
    iteration: int | None = None
    sidecar: Path | None = None
    metadata_from: Path | None = None
    ema: bool = False
    weights_only: bool = False
    drop: frozenset[str] = frozenset()
    keep_foreign_objects: frozenset[str] = frozenset()
    replicas: str = REFUSE
    accept_stale: bool = False
    accept_permuted: bool = False
    overwrite: bool = False
    beside_source: bool = False
    dry_run: bool = False
    verbose: bool = False
    quiet: bool = False
    workers: int = 2
    ray: str | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        counts = {**self.sizes, "workers": self.workers}
        counts |= {"make_vocab_size_divisible_by": self.vocab_divisible_by or 1}
        for name, count in counts.items():
            if count < 1:
                raise RefusedError(f"{name} {count}: is not 1 or more")
        if self.replicas not in REPLICAS:
            raise RefusedError(f"replicas {self.replicas}: choose one of {', '.join(REPLICAS)}")


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it. Exit status 0, or 1 where differences were found and are listed.

    `converted` pairs each rank's folder in the source with its file in the output.
    """

    status: int
    lines: list[str]
    converted: list[tuple[Path, str]] = field(default_factory=list)
