"""The commands of `parammap`, a module each: its docstring's first line is the help,
`add_arguments` its flags, `run` it."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value
