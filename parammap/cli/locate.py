"""`parammap locate CKPT 'NAME[row,col]'`: where an element lies on disk; with --file and --offset,
what lies at a byte."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parammap.cli import reading
from parammap.errors import RefusedError
from parammap.frameworks.flags import positive
from parammap.proof.locate import Answer, StoredRun, identify, locate, value_at
from parammap.tensors.logical import ITEMSIZE

_AXES = ("tp", "pp", "ep", "vpp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    reading.add_checkpoint(parser)
    add(
        "tensor",
        nargs="?",
        metavar="NAME[INDEX,…]",
        help="an atom's name, or a tensor's own in the files, after exp_avg. "
        "or exp_avg_sq. for a moment; an index is a number, a:b or :",
    )
    add(
        "--file",
        type=Path,
        metavar="FILE",
        help="the way back: what lies at byte --offset of this file?",
    )
    add("--offset", type=int, metavar="N", help="see --file")
    add(
        "--limit",
        type=positive,
        default=20,
        metavar="N",
        help="ranges to print (default: %(default)s; --json has all)",
    )
    for axis in _AXES:
        add(f"--{axis}", type=int, metavar="N", help=f"only ranks with this {axis}")
    reading.add_arguments(parser)
    reading.add_common(parser)


def run(args: argparse.Namespace) -> int:
    if bool(args.tensor) == bool(args.file) or (args.file is None) != (args.offset is None):
        raise RefusedError("name either a tensor's element, NAME[index, …], or --file and --offset")
    checkpoint = reading.read(args.checkpoint, args)
    if args.file:
        answer = identify(checkpoint, args.file, args.offset)
        print(
            json.dumps(_answer(answer), indent=1) if args.json else "\n".join(_answer_lines(answer))
        )
        return 0
    runs = locate(
        checkpoint,
        args.tensor,
        {axis: number for axis in _AXES if (number := getattr(args, axis)) is not None},
    )
    if args.json:
        print(json.dumps([_entry(run) for run in runs], indent=1))
        return 0
    shown = list(itertools.islice(runs, args.limit))
    print("\n".join(_line(run) for run in shown))
    if left := sum(1 for _ in runs):
        print(f"… and {left} more ranges; --json lists all")
    return 0


def _entry(run: StoredRun) -> dict[str, Any]:
    """`index` and `rows` × `columns` count in the logical tensor seen as a matrix."""
    return {
        "tensor": run.tensor.name,
        "role": run.tensor.state,
        "dtype": run.tensor.dtype,
        "shape": list(run.tensor.shape),
        "place": asdict(run.place),
        "file": run.file,
        "key": run.key,
        "element": run.element,
        "offset": run.offset,
        "bytes": run.nbytes,
        "index": list(run.region.offsets),
        "rows": run.region.sizes[0],
        "columns": run.region.sizes[1],
        "first_value": value_at(run.file, run.offset, run.tensor.dtype),
    }


def _line(run: StoredRun) -> str:
    count = run.region.numel
    value = value_at(run.file, run.offset, run.tensor.dtype)
    what = f"{list(run.region.offsets)}" + (f" and {count - 1} more" if count > 1 else "")
    return (
        f"{run.tensor.name} ({run.tensor.state}) {what} = {value:.9g}{' …' if count > 1 else ''}: "
        f"{run.file} bytes "
        f"{run.offset} to {run.offset + run.nbytes}, {run.key} element {run.element} ({run.place})"
    )


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "file": answer.file,
        "offset": answer.offset,
        "elements": [_entry(run) for run in answer.runs],
        "key": answer.key,
        "element": answer.element,
        "what": answer.what or None,
    }


def _answer_lines(answer: Answer) -> list[str]:
    if not answer.runs:
        key = f" in {answer.key}, element {answer.element}" if answer.key is not None else ""
        return [f"{answer.file} byte {answer.offset}: {answer.what}{key}"]
    return [
        _line(run)
        + f"; byte {(answer.offset - run.offset) % ITEMSIZE[run.tensor.dtype]} of the element"
        for run in answer.runs
    ]
