"""Replicas: what several ranks keep copies of, such as norms and biases under tensor parallelism, has to be equal in all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..digest import bits_dtype
from ..index import Index
from ..tensors import Box, Piece, Tensor
from .compare import Difference, values
from .stream import Files, in_processes, read_part, read_piece


def unequal(index: Index, workers: int = 1) -> tuple[list[Tensor], list[Difference]]:
    """The tensors of which ranks keep copies, and what differs, bit by bit, between the first copy (`a`) and each other.

    Elements count in the logical tensor. A tensor has a Difference for every rank whose copy is not the first one's.
    """
    copied = [tensor for tensor, boxes in index.boxes.items() if any(map(_copies, boxes.values()))]
    found = in_processes(lambda tensor: _differences(index, tensor), copied, workers)
    return copied, [difference for differences in found for difference in differences]


def _copies(pieces: list[Piece]) -> list[Piece]:
    """The pieces but the first, and but those that are the very bytes of it."""
    first = pieces[0]
    return [piece for piece in pieces[1:] if (piece.file, piece.offset) != (first.file, first.offset)]


def _differences(index: Index, tensor: Tensor) -> list[Difference]:
    by_rank: dict[int, Difference] = {}
    with Files() as files:
        for pieces in index.boxes[tensor].values():
            for other, band, bits, others in _bands(pieces[0], _copies(pieces), files):
                if not np.array_equal(bits, others):
                    found = by_rank.setdefault(other.replica, Difference(tensor, tensor))
                    a, b = (_logical(other, band, copy) for copy in (bits, others))
                    found.add(other.turned(band), np.flatnonzero(a != b), values(a, tensor.dtype),
                              values(b, tensor.dtype), places=(_place(pieces[0]), _place(other)))
    for found in by_rank.values():
        found.shorten()
    return list(by_rank.values())


def _bands(first: Piece, copies: list[Piece], files: Files) -> Iterator[tuple[Piece, Box, np.ndarray, np.ndarray]]:
    """Each copy with each band of the first, and the bits of both, as they lie on disk; every byte is read once."""
    for band, bits in read_piece(first, files) if copies else ():
        others = np.empty(band.numel, bits_dtype(first.tensor.dtype))
        for other in copies:
            read_part(other, band, files, others)
            yield other, band, bits, others


def _logical(piece: Piece, band: Box, bits: np.ndarray) -> np.ndarray:
    """The bits of a band, which are as they lie on disk, as the logical tensor has them."""
    return bits.reshape(band.rows, band.cols).T.reshape(-1) if piece.transposed else bits


def _place(piece: Piece):
    return lambda row, col: (piece.file, piece.offset_of(row, col))
