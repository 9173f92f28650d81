"""`parammap diff A B`: compare two checkpoints of any framework and layout, element by element."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from parammap.cli import reading
from parammap.cli.positions import positions
from parammap.proof.compare import Difference
from parammap.proof.diff import Comparison, diff
from parammap.tensors.names import shorten_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("a", type=Path, metavar="A", help="a checkpoint")
    add("b", type=Path, metavar="B", help="another")
    add(
        "--rtol",
        type=float,
        metavar="X",
        help="equal if |a - b| <= atol + rtol |b| (default: equal bit by bit)",
    )
    add("--atol", type=float, metavar="Y", help="see --rtol")
    reading.add_arguments(parser, "A")
    reading.add_arguments(parser, "B", prefix="b-")
    reading.add_common(parser)


def run(args: argparse.Namespace) -> int:
    a, b = reading.read(args.a, args), reading.read(args.b, args, prefix="b_")
    found = diff(a, b, args.rtol, args.atol, args.workers)
    print(json.dumps(_facts(found), indent=1) if args.json else "\n".join(_lines(found)))
    return 0 if found.is_equal else 1


def _facts(found: Comparison) -> dict[str, Any]:
    return {
        "a": str(found.a),
        "b": str(found.b),
        "tensors_compared": len(found.compared),
        "elements_compared": found.elements,
        "own_copies_of_weights_not_compared": found.aside,
        "padding_not_compared": [str(tensor) for tensor in found.padding],
        "only_in_a": [str(tensor) for tensor in found.only_in_a],
        "only_in_b": [str(tensor) for tensor in found.only_in_b],
        "metadata": found.metadata,
        "wrong_shapes": found.wrong_shapes,
        "differences": [_entry(one) for one in found.differences],
    }


def _entry(found: Difference) -> dict[str, Any]:
    return {
        "name": found.a.name,
        "name_b": found.b.name,
        "role": found.a.state,
        "elements": found.elements,
        "of": found.a.numel,
        "largest_difference": found.largest,
        "other": found.apart,
        "first": positions(found),
    }


def _lines(found: Comparison) -> list[str]:
    lines = [
        f"only in {side}: {shorten_names(map(str, alone))}"
        for side, alone in ((found.a, found.only_in_a), (found.b, found.only_in_b))
        if alone
    ]
    lines += [f"metadata: {line}" for line in found.metadata] + found.wrong_shapes
    for one in found.differences:
        lines.append(
            f"{one.name}: "
            + (f"{one.apart}; " if one.apart else "")
            + f"{one.elements} of {one.a.numel} elements differ, by at most {one.largest:.9g}"
        )
        lines += [
            f"    [{at.row}, {at.column}]  {at.a:.9g}  {at.b:.9g}   {at.place_a[0]} byte "
            f"{at.place_a[1]}, {at.place_b[0]} byte {at.place_b[1]}"
            for at in one.positions
        ]
    if found.aside:
        lines.append(
            f"{found.aside} copies of weights, which the model computes with, are in one of them "
            "only and were not compared"
        )
    if found.padding:
        lines.append(
            "padding of the vocabulary, of another number of rows, was not compared: "
            f"{shorten_names(map(str, found.padding))}"
        )
    lines.append(
        f"{len(found.compared)} tensors compared, {found.elements} elements: "
        f"{len(found.differences) or 'none'} differ"
    )
    return lines
