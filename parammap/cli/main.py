"""The command line `parammap`: flags in, exit status out (0 done, 1 differences found, 2 refused, 3
a task failed)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from parammap.cli import convert, diff, digest, formats, inspect, locate, patch, verify
from parammap.errors import RefusedError, TaskError
from parammap.version import __version__

COMMANDS = {
    "convert": convert,
    "inspect": inspect,
    "digest": digest,
    "verify": verify,
    "diff": diff,
    "locate": locate,
    "formats": formats,
    "patch": patch,
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser(sys.argv[1:] if argv is None else argv).parse_args(argv)
    return run(lambda: args.run(args))


def run(command: Callable[[], int]) -> int:
    """Run a command that returns an exit status; errors that a user can act on become one line and
    a status."""
    try:
        status = command()
        print(end="", flush=True)
        return status
    except RefusedError as error:
        print(f"parammap: {error}", file=sys.stderr)
        return 2
    except TaskError as error:
        print(
            f"parammap: {error}; nothing was published, and the same command goes on from here",
            file=sys.stderr,
        )
        return 3
    except KeyboardInterrupt:
        print("parammap: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (
        BrokenPipeError
    ):  # whoever read the output, such as head, wants no more of it; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """With the flags of the command that `argv` names alone."""
    parser = argparse.ArgumentParser(
        prog="parammap", description="Move a training state between frameworks, exactly."
    )
    parser.add_argument("--version", action="version", version=f"parammap {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = (module.__doc__ or "").partition("\n\n")[0].split("`: ")[-1]
        command = commands.add_parser(name, allow_abbrev=False, help=text, description=text)
        command.set_defaults(run=module.run)
        if name in argv:
            module.add_arguments(command)
    return parser
