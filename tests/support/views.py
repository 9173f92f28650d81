"""What a view of a file holds, by numpy alone."""

from pathlib import Path

import numpy as np


def bits_of(view) -> np.ndarray:
    """The bits of a view's elements, as unsigned integers of their width; shape of the view."""
    content = Path(view.file).read_bytes()
    return np.ndarray(view.shape, f"<u{view.itemsize}", content, view.offset, view.strides)


def matrix_of(tensor, regions, number: int = 0) -> np.ndarray:
    """The matrix of a logical tensor, put together from the `number`-th copy of each of its
    regions; all bits set where there is none."""
    whole = None
    for region, shards in regions.items():
        bits = bits_of(shards[min(number, len(shards) - 1)].view)
        whole = np.full(tensor.matrix, -1).astype(bits.dtype) if whole is None else whole
        (row, col), (row_end, col_end) = region.offsets, region.ends
        whole[row:row_end, col:col_end] = bits.reshape(region.sizes)
    return whole
