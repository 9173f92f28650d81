"""The flags of `parammap convert` that only some targets have, and the options that they make."""

from __future__ import annotations

import argparse
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
    target, given = registry.target(args.to), {}
    for flag, targets in _flags():
        value = getattr(args, flag.option)
        if value is not None and args.to not in targets:
            raise RefusedError(
                f"{flag.name}: means nothing with --to {args.to}, only with "
                f"{', '.join(targets)}; leave it out"
            )
        if value is not None:
            given[flag.option] = value
    _check(args, target)
    return target.options(**given)


def _check(args: argparse.Namespace, target: Target) -> None:
    if args.format and args.format not in target.formats:
        raise RefusedError(
            f"--format {args.format}: is no format of --to {target.name}, only "
            f"{', '.join(target.formats)} are"
        )
    alone = target.weights_only_dtypes
    if args.dtype and alone is not None and not (args.weights_only and args.dtype in alone):
        raise RefusedError(
            f"--dtype {args.dtype}: an optimizer's states keep their dtype; {', '.join(alone)} "
            f"goes with --to {target.name} --weights-only"
        )


def _flags() -> list[tuple[Flag, list[str]]]:
    """Each flag with the targets that have it, those of several targets first."""
    found: dict[str, tuple[Flag, list[str]]] = {}
    for name, target in registry.targets().items():
        for flag in target.all_flags:
            found.setdefault(flag.name, (flag, []))[1].append(name)
    return sorted(found.values(), key=lambda one: len(one[1]) == 1)
