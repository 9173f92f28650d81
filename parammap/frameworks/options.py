"""The options of a target as a user gives them: by the flags of `parammap convert` that only some
targets have, or by the arguments of a function that have their names."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from parammap.errors import RefusedError
from parammap.frameworks import registry
from parammap.frameworks.flags import FORMAT, Flag
from parammap.frameworks.target import Target


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    formats = list(dict.fromkeys(one for to in registry.targets().values() for one in to.formats))
    for flag, targets in _flags():
        facts = {"choices": formats} if flag == FORMAT else flag.facts
        parser.add_argument(flag.name, **facts, help=f"{', '.join(targets)}: {flag.help}")


def of(args: argparse.Namespace) -> Any:
    """The options of the target that `args.to` names. Raises RefusedError for a flag that is not
    one of its own, and for a value that it does not take."""
    given = [(flag, getattr(args, flag.option)) for flag, _ in _flags()]
    return _options(
        registry.target(args.to),
        [(flag, value) for flag, value in given if value is not None],
        args.weights_only,
    )


def options_of(to: str, given: Mapping[str, object], *, weights_only: bool) -> Any:
    """The options of a target; `given` are values by the names of its flags (max_shard_size),
    `weights_only` says whether it is without the optimizer's states. Raises RefusedError for what
    is no option of it, and for a value that its flag does not take."""
    target, known = registry.target(to), {flag.keyword: flag for flag, _ in _flags()}
    if unknown := sorted(given.keys() - known.keys()):
        raise RefusedError(f"{unknown[0]}: means nothing with --to {to}; leave it out")
    parsed = [(known[name], known[name].parse(value)) for name, value in given.items()]
    return _options(target, [one for one in parsed if one[1] is not None], weights_only)


def _options(target: Target, given: Iterable[tuple[Flag, Any]], weights_only: bool) -> Any:
    targets, taken = {flag.name: its for flag, its in _flags()}, {}
    for flag, value in given:
        if target.name not in targets[flag.name]:
            raise RefusedError(
                f"{flag.name}: means nothing with --to {target.name}, only with "
                f"{', '.join(targets[flag.name])}; leave it out"
            )
        taken[flag.option] = value
    _check(target, taken, weights_only)
    return target.options(**taken)


def _check(target: Target, taken: Mapping[str, Any], weights_only: bool) -> None:
    format, dtype, alone = taken.get("format"), taken.get("dtype"), target.weights_only_dtypes
    if format and format not in target.formats:
        raise RefusedError(
            f"--format {format}: is no format of --to {target.name}, only "
            f"{', '.join(target.formats)} are"
        )
    if dtype and alone is not None and not (weights_only and dtype in alone):
        raise RefusedError(
            f"--dtype {dtype}: an optimizer's states keep their dtype; {', '.join(alone)} "
            f"goes with --to {target.name} --weights-only"
        )


def _flags() -> list[tuple[Flag, list[str]]]:
    """Each flag with the targets that have it, those of several targets first."""
    found: dict[str, tuple[Flag, list[str]]] = {}
    for name, target in registry.targets().items():
        for flag in target.all_flags:
            found.setdefault(flag.name, (flag, []))[1].append(name)
    return sorted(found.values(), key=lambda one: len(one[1]) == 1)
