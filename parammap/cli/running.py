"""What all commands have that convert: how they run, and how they tell what came of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from parammap.frameworks.flags import positive
from parammap.job import conversion
from parammap.job.request import REPLICAS, Report, Request
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


def how(args: argparse.Namespace) -> dict[str, Any]:
    """What these flags say, by the names of a Request."""
    return {name: getattr(args, name) for name in ("replicas", "workers", "overwrite", "dry_run")}


def script_parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a script whose docstring begins with what it does."""
    return argparse.ArgumentParser(description=(doc or "").partition("\n\n")[0], allow_abbrev=False)


def add_process_flags(parser: argparse.ArgumentParser, processes: int) -> None:
    """As MindSpeed-Core-MS's tools have them."""
    add, more = parser.add_argument, "(default: %(default)s)"
    add("--multiprocess-off", action="store_true", help="work in this process alone")
    add("--process-limit", type=positive, default=processes, help=f"worker processes {more}")
    add("--process_timeout", type=positive, default=3600, help=f"seconds until it gives up {more}")


def how_by_process_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What these flags say, by the names of a Request."""
    workers = 1 if args.multiprocess_off else args.process_limit
    return {"workers": workers, "timeout": args.process_timeout}


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


def convert(request: Request, below: Path | None = None) -> int:
    """Convert, and `tell`."""
    return tell(conversion.convert(request), below)


def tell(report: Report, target: Path | None = None) -> int:
    """Print a report, with a line for each file below `target` if that is given; its status."""
    if target:
        for source, path in report.converted:
            print(f"convert '{source}' to '{target / path}' successfully.")
    print("\n".join(report.lines))
    return report.status
