"""Progress on a terminal as one line that rewrites itself, elsewhere as a plain line now and
then."""

from __future__ import annotations

import sys
import time
from multiprocessing import get_context
from typing import TextIO

_BAR = 24
_PLAIN_SECONDS = 10.0


class Progress:
    """Counts the bytes that all worker processes have written, out of `total`."""

    def __init__(
        self, total: int, done: int = 0, stream: TextIO | None = None, is_quiet: bool = False
    ) -> None:
        self.total, self.resumed = total, done
        self.stream = stream or sys.stderr
        self.is_quiet = is_quiet
        self.terminal = self.stream.isatty()
        self.written = get_context("fork").Value("q", done)
        self.started = self.shown = time.monotonic()

    def add(self, nbytes: int) -> None:
        with self.written.get_lock():
            self.written.value += nbytes

    def advance(self, nbytes: int) -> None:
        """Add and show, where one process does it all."""
        self.add(nbytes)
        self.show()

    def show(self, last: bool = False) -> None:
        if self.is_quiet:
            return
        now = time.monotonic()
        if not last and now - self.shown < (0.2 if self.terminal else _PLAIN_SECONDS):
            return
        self.shown = now
        end = "\r" if self.terminal and not last else "\n"
        try:
            print(self._line(now), end=end, file=self.stream, flush=True)
        except OSError:  # of a log on a full disk: the conversion itself can go on
            self.is_quiet = True

    def _line(self, now: float) -> str:
        done, seconds = self.written.value, max(now - self.started, 1e-6)
        speed = (done - self.resumed) / seconds
        left = (self.total - done) / speed if speed else 0.0
        share = done / self.total if self.total else 1.0
        bar = "#" * int(share * _BAR) + "." * (_BAR - int(share * _BAR))
        text = f"{share:4.0%}  {done / 1e9:.2f} of {self.total / 1e9:.2f} GB  {speed / 1e9:.2f} GB/s  {left:.0f} s left"
        return f"[{bar}] {text}" if self.terminal else text
