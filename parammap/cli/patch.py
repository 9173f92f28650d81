"""`parammap patch FRAMEWORK`: print the patch that has a training write its sidecars, for `git
apply`."""

from __future__ import annotations

import argparse
from importlib.resources import files

from parammap.errors import RefusedError

#: framework: (its patch, what it applies to)
PATCHES = {
    "megatron": ("param_map.patch", "Megatron-LM, core_r0.6.0 to core_r0.19.0 and main"),
    "metaseq": ("metaseq_param_map.patch", "metaseq, main and its branches"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "framework", nargs="?", choices=sorted(PATCHES), help="whose training is patched"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the patches and what they apply to"
    )


def run(args: argparse.Namespace) -> int:
    if args.list:
        print("\n".join(f"{framework:<10} {what}" for framework, (_, what) in PATCHES.items()))
        return 0
    if args.framework is None:
        raise RefusedError(
            f"patch: name a framework: {' or '.join(PATCHES)}; --list says what the patches apply "
            f"to"
        )
    name, _ = PATCHES[args.framework]
    print((files("parammap") / "patches" / name).read_text(encoding="utf-8"), end="")
    return 0
