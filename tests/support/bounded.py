"""A call in a process of its own that may take no more than a little memory and time."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection

from parammap.errors import RefusedError

MEGABYTES = 200
#: far more than is needed, as other jobs share the machine
SECONDS = 20


def refusal_of(call: Callable[[], object]) -> str:
    """The one line with which `call` is refused, within MEGABYTES and SECONDS.

    Raises AssertionError if it is not, or takes more."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_run, args=(call, sender))
    child.start()
    sender.close()
    try:
        assert receiver.poll(SECONDS), f"took more than {SECONDS} s"
        kind, text, grown = receiver.recv()
    except EOFError:
        child.join()
        raise AssertionError(f"the process ended with {child.exitcode}") from None
    finally:
        child.kill()
        child.join()
    assert kind == RefusedError.__name__ and "MemoryError" not in text, f"{kind}: {text}"
    assert grown < MEGABYTES << 20, f"took {grown >> 20} MB"
    assert text.isprintable()
    return text


def _run(call: Callable[[], object], sender: Connection) -> None:
    before = _peak()
    limit = _address_space() + (4 * MEGABYTES << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        outcome = "returned", repr(type(call()))
    except BaseException as error:
        outcome = type(error).__name__, str(error)
    sender.send((*outcome, _peak() - before))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
