"""`parammap formats`: which framework's checkpoints can be written for which other one."""

from __future__ import annotations

import argparse

from parammap.frameworks import conversions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    print(conversions.tables())
    return 0
