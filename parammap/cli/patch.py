"""`parammap patch FRAMEWORK`: print the patch that has a training write its sidecars, for `git
apply`."""

from __future__ import annotations

import argparse
from importlib.resources import files

from parammap.errors import RefusedError
from parammap.frameworks import registry
from parammap.frameworks.framework import Patch


def patches() -> dict[str, Patch]:
    """By framework."""
    return {one.name: one.patch for one in registry.frameworks() if one.patch}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "framework", nargs="?", choices=list(patches()), help="whose training is patched"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the patches and what they apply to"
    )


def run(args: argparse.Namespace) -> int:
    if args.list:
        print("\n".join(f"{name:<10} {patch.applies_to}" for name, patch in patches().items()))
        return 0
    if args.framework is None:
        raise RefusedError(
            f"patch: name a framework: {' or '.join(patches())}; --list says what the patches apply "
            f"to"
        )
    patch = patches()[args.framework]
    print((files("parammap") / "patches" / patch.file).read_text(encoding="utf-8"), end="")
    return 0
