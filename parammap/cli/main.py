"""The command line `parammap`: flags in, exit status out (0 done, 1 differences found, 2 refused, 3
a task failed, or the program has a defect)."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from tempfile import NamedTemporaryFile

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from parammap.cli import convert, diff, digest, formats, inspect, locate, patch, verify
from parammap.errors import RefusedError, TaskError, said
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


#: set to anything, it lets a defect end the program with its traceback
TRACEBACK = "PARAMMAP_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser(sys.argv[1:] if argv is None else argv).parse_args(argv)
    return run(lambda: args.run(args))


def run(command: Callable[[], int]) -> int:
    """Run a command that returns an exit status; every error becomes one line and a status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be of any bytes
    try:
        status = command()
        print(end="", flush=True)
        return status
    except RefusedError as error:
        return _say(str(error), 2)
    except TaskError as error:
        return _say(f"{error}; nothing was published, and the same command goes on from here", 3)
    except KeyboardInterrupt:
        return _say("interrupted; the same command goes on from here", 130)
    except BrokenPipeError:  # whoever read the output, such as head, wants no more of it
        _close_output()
        return 141
    except OSError as error:
        if error.filename is not None:
            return _say(said(error, ""), 2)
        _close_output()  # files are named: what has no name is the output
        return _say(said(error, "standard output"), 3)
    except Exception as error:
        if TRACEBACK in os.environ:
            raise
        what = f"{type(error).__name__}: {error}"[:200]
        return _say(f"a defect of the program ({what}); {_where_it_was_written()}", 3)


def _say(line: str, status: int) -> int:
    """One line, whatever names in it hold, for an exit status."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    with suppress(OSError):  # nobody can be told
        print(f"parammap: {shown}", file=sys.stderr, flush=True)
    return status


def _close_output() -> None:
    """Let what is left of the output go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _where_it_was_written() -> str:
    try:
        with NamedTemporaryFile(
            "w", prefix="parammap-", suffix=".txt", delete=False, errors="backslashreplace"
        ) as file:
            traceback.print_exc(file=file)
    except OSError as error:
        return f"{TRACEBACK}=1 shows where ({said(error, 'its traceback')})"
    return f"please report it with {file.name}"


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
