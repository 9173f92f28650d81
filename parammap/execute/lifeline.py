"""Worker processes that end with the process that started them, however that ends.

A worker left alone would go on writing, and hold the lock of a run that is over."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from threading import Thread

#: linux/prctl.h: the signal that a process gets when the one that forked it ends
_PR_SET_PDEATHSIG = 1


class Lifeline:
    """A pipe of which only the parent keeps the writing end: it ends when the parent does. Linux
    sends a signal beside, which needs no thread to be scheduled."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        self.read_end, self.write_end = os.pipe()

    def hold(self) -> None:
        """To be called in a worker, once: from now on it ends with the parent."""
        os.close(self.write_end)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        Thread(target=self._wait, daemon=True).start()
        if os.getppid() != self.parent:
            os._exit(1)

    def close(self) -> None:
        """To be called in the parent, once its workers have ended."""
        os.close(self.read_end)
        os.close(self.write_end)

    def _wait(self) -> None:
        os.read(self.read_end, 1)
        os._exit(1)
