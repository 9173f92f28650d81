"""`parammap diff A B`: compare two checkpoints of any framework and layout, element by element."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from parammap.cli import reading
from parammap.errors import RefusedError
from parammap.frameworks import registry
from parammap.name_list import shorten_names
from parammap.proof.compare import Difference, Tolerance, differences, metadata_differences, pair


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
    pairing = pair(a, b)
    tolerance = (
        None
        if args.rtol is None and args.atol is None
        else Tolerance(args.rtol or 0.0, args.atol or 0.0)
    )
    if tolerance and min(tolerance.rtol, tolerance.atol) < 0:
        raise RefusedError("--rtol, --atol: a tolerance is not negative")
    found = differences(a.index, b.index, pairing.pairs, tolerance, args.workers)
    facts = {
        "a": str(a.folder),
        "b": str(b.folder),
        "tensors_compared": len(pairing.pairs),
        "elements_compared": sum(one.elements for one in pairing.pairs),
        "own_copies_of_weights_not_compared": pairing.aside,
        "padding_not_compared": [f"{tensor.name} ({tensor.role})" for tensor in pairing.padding],
        "only_in_a": [f"{tensor.name} ({tensor.role})" for tensor in pairing.only_a],
        "only_in_b": [f"{tensor.name} ({tensor.role})" for tensor in pairing.only_b],
        "metadata": metadata_differences(a, b),
        "wrong_shapes": [
            f"{one.folder}: {names}: {what}"
            for one in (a, b)
            for names, what in registry.framework(one.framework).contradictions(one).items()
        ],
        "differences": [_entry(one) for one in found],
    }
    print(json.dumps(facts, indent=1) if args.json else "\n".join(_lines(facts)))
    return (
        1
        if any(
            facts[key]
            for key in ("only_in_a", "only_in_b", "metadata", "wrong_shapes", "differences")
        )
        else 0
    )


def _entry(found: Difference) -> dict:
    return {
        "name": found.a.name,
        "name_b": found.b.name,
        "role": found.a.role,
        "elements": found.elements,
        "of": found.a.rows * found.a.cols,
        "largest_difference": found.largest,
        "other": found.apart,
        "first": [
            {
                "row": at.row,
                "column": at.column,
                "a": at.a,
                "b": at.b,
                "file_a": at.place_a[0],
                "offset_a": at.place_a[1],
                "file_b": at.place_b[0],
                "offset_b": at.place_b[1],
            }
            for at in found.positions
        ],
    }


def _lines(facts: dict) -> list[str]:
    lines = []
    for side in ("a", "b"):
        if facts[f"only_in_{side}"]:
            lines.append(f"only in {facts[side]}: {shorten_names(facts[f'only_in_{side}'])}")
    lines += [f"metadata: {line}" for line in facts["metadata"]] + facts["wrong_shapes"]
    for one in facts["differences"]:
        names = " and ".join(dict.fromkeys((one["name"], one["name_b"])))
        lines.append(
            f"{names} ({one['role']}): "
            + (f"{one['other']}; " if one["other"] else "")
            + f"{one['elements']} of {one['of']} elements differ, by at most "
            f"{one['largest_difference']:.9g}"
        )
        lines += [
            f"    [{at['row']}, {at['column']}]  {at['a']:.9g}  {at['b']:.9g}   {at['file_a']} "
            f"byte {at['offset_a']}, "
            f"{at['file_b']} byte {at['offset_b']}"
            for at in one["first"]
        ]
    if facts["own_copies_of_weights_not_compared"]:
        lines.append(
            f"{facts['own_copies_of_weights_not_compared']} copies of weights, which the model "
            f"computes with, are "
            "in one of them only and were not compared"
        )
    if facts["padding_not_compared"]:
        lines.append(
            f"padding of the vocabulary, of another number of rows, was not compared: "
            f"{shorten_names(facts['padding_not_compared'])}"
        )
    lines.append(
        f"{facts['tensors_compared']} tensors compared, {facts['elements_compared']} elements: "
        f"{len(facts['differences']) or 'none'} differ"
    )
    return lines
