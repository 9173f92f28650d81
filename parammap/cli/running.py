"""What all commands have that convert: how they run, and how they tell what came of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from parammap.frameworks.flags import positive
from parammap.job.request import REPLICAS, Report
from parammap.plan.planner import REFUSE


def add_arguments(
    parser: argparse.ArgumentParser,
    keepers: str = "ranks",
    replaced: str = "an output folder that has content",
    workers: int = 2,
) -> None:
    """`keepers` are those who may keep copies that differ."""
    add = parser.add_argument
    add(
        "--replicas",
        choices=REPLICAS,
        default=REFUSE,
        help=f"what to take where {keepers} keep different copies (default: %(default)s)",
    )
    add(
        "--workers",
        type=positive,
        default=workers,
        metavar="N",
        help="processes (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help=f"replace {replaced}")
    add("--dry-run", action="store_true", help="print what would be written, and write nothing")


def add_merak_sizes(parser: argparse.ArgumentParser) -> None:
    """As Merak's own scripts have them."""
    for size, what in (("tp", "tensor"), ("pp", "pipeline")):
        parser.add_argument(
            f"--merak_{size}",
            type=positive,
            default=1,
            metavar="N",
            help=f"{what} parallel size of the output (default: 1)",
        )


def tell(report: Report, target: Path | None = None) -> int:
    """Print a report, with a line for each file below `target` if that is given; its status."""
    if target:
        for source, path in report.converted:
            print(f"convert '{source}' to '{target / path}' successfully.")
    print("\n".join(report.lines))
    return report.status
