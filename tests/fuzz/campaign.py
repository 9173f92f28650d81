"""Runs cases in a child process, so that a crash, a bomb and an endless loop are findings as a
traceback is."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import resource
import signal
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from parammap.errors import RefusedError, TaskError
from tests.fuzz.targets import TARGETS, Run

#: what a case may take, on a machine that others use as well
SECONDS, MEGABYTES = 60, 200
REFUSED, DEFECT = "refused in one line", "DEFECT"


@dataclass(slots=True)
class Result:
    """How many cases ended in which class, and the findings: target, seed, and what happened."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def run(name: str, first: int, cases: int | None, until: float, scratch: Path) -> Result:
    """Run the cases of a target with the seeds from `first` on: `cases` of them, or until a time."""
    result, seed = Result(), first
    while (cases is None or seed < first + cases) and time.monotonic() < until:
        left = None if cases is None else first + cases - seed
        seed = _child(name, seed, left, until, scratch, result)
    return result


def _child(
    name: str, first: int, cases: int | None, until: float, scratch: Path, result: Result
) -> int:
    """The seed to go on with, after the cases of one child."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(name, first, cases, until, scratch, sender))
    child.start()
    sender.close()
    seed, done = first, False
    with contextlib.suppress(EOFError):
        while True:
            if not receiver.poll(2 * SECONDS):
                child.kill()
                break
            kind, text = receiver.recv()
            if kind == "end":
                done = True
                break
            seed += 1
            result.counts[kind] += 1
            if kind == DEFECT:
                result.findings.append(f"{name}, seed {seed - 1}: {text}")
    child.join()
    if done:
        return seed
    result.counts[DEFECT] += 1
    result.findings.append(f"{name}, seed {seed}: the process ended with {child.exitcode}")
    return seed + 1


def _work(
    name: str, first: int, cases: int | None, until: float, scratch: Path, sender: Connection
) -> None:
    signal.signal(signal.SIGALRM, _late)
    folder = scratch / f"{name.replace(' ', '_')}_{first}"
    folder.mkdir(parents=True)
    case, seed = TARGETS[name].prepare(folder), first
    while (cases is None or seed < first + cases) and time.monotonic() < until:
        signal.alarm(SECONDS)
        before = _peak()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            outcome = _outcome(case, random.Random(f"{name} {seed}"))
        signal.alarm(0)
        grown = (_peak() - before) >> 10
        if grown > MEGABYTES:
            outcome = DEFECT, f"took {grown} MB; then: {' '.join(outcome)}"
        sender.send(outcome)
        seed += 1
    sender.send(("end", ""))
    sender.close()
    os._exit(0)


def _outcome(case: Run, random: random.Random) -> tuple[str, str]:
    try:
        return case(random), ""
    except (RefusedError, TaskError) as error:
        text = str(error)
        is_one_line = text.isprintable() and len(text) < 2000
        return (REFUSED, text) if is_one_line else (DEFECT, f"no one line: {text!r:.300}")
    except BaseException:
        return DEFECT, traceback.format_exc()


def _late(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
