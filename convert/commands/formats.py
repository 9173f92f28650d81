"""`parammap formats`: which framework's checkpoints can be written for which other one."""

from __future__ import annotations

import argparse

from .. import formats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    print(formats.tables())
    return 0
