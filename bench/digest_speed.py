"""How fast one core digests: GB of checkpoint per second, in memory, for whole tensors and for
pieces of columns."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from parammap.execute.writer import BUFFER_BYTES  # noqa: E402
from parammap.tensors.digest import bits_dtype, cells_digest  # noqa: E402
from parammap.tensors.logical import ITEMSIZE  # noqa: E402
from parammap.tensors.region import Cells  # noqa: E402

TOTAL_BYTES, REPEATS = 64 << 20, 5
ROWS_COLS = 4096
#: what is digested of a tensor of ROWS_COLS columns: from which column on, and how many
CASES = {
    "whole rows": (0, ROWS_COLS),
    "half of the columns": (ROWS_COLS // 2, ROWS_COLS // 2),
    "64 of the columns": (ROWS_COLS // 2, 64),
}


def rate(dtype: str, case: str) -> float:
    """GB/s of processor time, median of a few repeats over buffers as large as the converter's."""
    first, cols = CASES[case]
    rows, cells = BUFFER_BYTES // ITEMSIZE[dtype] // cols, Cells(0, first, (1,))
    bits = np.random.default_rng(0).integers(0, 1 << 16, (rows, cols)).astype(bits_dtype(dtype))
    count = TOTAL_BYTES // bits.nbytes
    seconds = []
    for _ in range(REPEATS):
        started = time.thread_time()
        for _ in range(count):
            cells_digest(bits, cells)
        seconds.append(time.thread_time() - started)
    return count * bits.nbytes / sorted(seconds)[REPEATS // 2] / 1e9


def main() -> None:
    for dtype in ("float32", "bfloat16"):
        print(f"{dtype:9}" + "".join(f"  {case}: {rate(dtype, case):.2f} GB/s" for case in CASES))


if __name__ == "__main__":
    main()
