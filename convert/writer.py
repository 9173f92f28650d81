"""Writing one output file: streamed through fixed buffers, hashed and checked on the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import BinaryIO

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .checks import Elements, Misfit, NonFinite, Overflown, Unequal, cast, compare, mean_bits, non_finite, overflown, unequal
from .containers import frames
from .digest import MASK, bits_dtype, box_digest
from .errors import TaskError
from .plan import Copy, FileTask, Transpose, Twin, Weave
from .tensors import ITEMSIZE, Box, Tensor, TensorSpec

BUFFER_BYTES = 256 << 10
REPORT_BYTES = 8 << 20
#: what is held of a tensor that is transposed: the higher the strip, the wider the runs that are read of each row
STRIP_BYTES = 16 << 20
#: rows that lie further apart than this are read one by one, others with what is between them
_GAP_BYTES = 16 << 10


@dataclass(slots=True)
class Outcome:
    """What a task found out: per (tensor, replica) the digest and the number of its elements, as they are and as a cast made
    them; misfits; replicas that differ; what is not finite or became so; bytes written."""

    path: str
    nbytes: int
    digests: dict[tuple[Tensor, int], tuple[int, int]] = field(default_factory=dict)
    misfits: dict[Tensor, Misfit] = field(default_factory=dict)
    unequal: dict[Tensor, Unequal] = field(default_factory=dict)
    non_finite: dict[Tensor, NonFinite] = field(default_factory=dict)
    overflown: dict[Tensor, Overflown] = field(default_factory=dict)


@lru_cache(maxsize=64)
def _as(tensor: Tensor, dtype: str) -> Tensor:
    return replace(tensor, dtype=dtype)


@dataclass(frozen=True, slots=True)
class _Part:
    """Columns of what was read of a copy, and which box of which tensor they are."""

    tensor: Tensor
    box: Box
    columns: slice

    def of(self, bits: np.ndarray) -> np.ndarray:
        """Its elements, row-major, of all that was read."""
        return bits.reshape(self.box.rows, -1)[:, self.columns].reshape(-1)


class Writer:
    """Writes one task's file front to back."""

    def __init__(self, task: FileTask, out: BinaryIO, report: Callable[[int], None]) -> None:
        self.task, self.out, self.report = task, out, report
        self.unreported = 0
        self.outcome = Outcome(task.path, task.nbytes)
        self.files: dict[str, int] = {}
        self.streams = {Copy: self._stream, Weave: self._weave, Transpose: self._transpose}
        #: the dtype of the tensor that is being written, and the strip that was last read of a twin that lies turned
        self.dtype, self.strip = "", (None, Box(0, 0, 0, 0), np.empty((0, 0)))
        self.buffer, self.twin_buffer, self.span_buffer, self.woven = (
            memoryview(bytearray(BUFFER_BYTES)) for _ in range(4))

    def write(self) -> Outcome:
        try:
            frames.write(self.task.segments, self._fill, self.out)
        finally:
            for descriptor in self.files.values():
                os.close(descriptor)
            self.report(self.unreported)
        return self.outcome

    def _fill(self, hole: frames.Hole) -> Iterator[memoryview]:
        """The bytes [start, start + nbytes) of an output tensor, streamed from the copies that make it up."""
        spec, position, end = self.task.specs[hole.tensor], 0, hole.start + hole.nbytes
        itemsize, self.dtype = ITEMSIZE[spec.dtype], spec.dtype
        for copy in self.task.copies[hole.tensor]:
            low, high = max(hole.start, position), min(end, position + copy.numel * itemsize)
            if low < high:
                stream = self.streams[type(copy)]
                for dtype, data in stream(copy, (low - position) // itemsize, (high - position) // itemsize, spec):
                    if dtype != spec.dtype:
                        data = memoryview(cast(np.frombuffer(data, bits_dtype(dtype)), dtype, spec.dtype)).cast("B")
                    yield data
                    self._progress(len(data))
            position += copy.numel * itemsize

    def _stream(self, copy: Copy, start: int, stop: int, spec: TensorSpec) -> Iterator[tuple[str, memoryview]]:
        """Elements [start, stop) of a run, in its dtype."""
        step = BUFFER_BYTES // max(ITEMSIZE[copy.dtype], ITEMSIZE[spec.dtype])
        for low, high in _chunks(start, stop, step, copy.cols):
            data = self._read(copy.file, copy.offset + low * ITEMSIZE[copy.dtype],
                              (high - low) * ITEMSIZE[copy.dtype], self.buffer, spec.name)
            position = 0
            for tensor, whole in copy.blocks:
                first, last = max(low, position), min(high, position + whole.numel)
                for box, element in whole.split_flat(first - position, last - position):
                    at = position + element - low
                    bits = np.frombuffer(data, bits_dtype(copy.dtype))[at:at + box.numel]
                    inside = Box(box.row - whole.row, box.rows, box.col - whole.col, box.cols)
                    self._observe(copy, [_Part(tensor, box, slice(None))], bits, position, whole, inside)
                position += whole.numel
            yield copy.dtype, data

    def _weave(self, weave: Weave, start: int, stop: int, spec: TensorSpec) -> Iterator[tuple[str, memoryview]]:
        """Elements [start, stop) of rows that are put together from panels, in their dtype: whole rows as far as they fit
        the buffers, else parts of one row."""
        dtype, cols = weave.panels[0].dtype, weave.cols
        itemsize = max(ITEMSIZE[dtype], ITEMSIZE[spec.dtype])
        fitting = BUFFER_BYTES // itemsize // max(cols, *(_reach(panel, panel.cols) for panel in weave.panels))
        while start < stop:
            row, col = divmod(start, cols)
            rows = min(fitting, (stop - start) // cols) if col == 0 else 0
            if rows:
                tile = np.frombuffer(self.woven, bits_dtype(dtype))[:rows * cols].reshape(rows, cols)
                left = 0
                for panel in weave.panels:
                    tile[:, left:left + panel.cols] = self._panel(panel, row, rows, 0, panel.cols)
                    left += panel.cols
                yield dtype, memoryview(tile).cast("B")
                start += rows * cols
                continue
            left, end = 0, min(cols, col + stop - start)
            for panel in weave.panels:
                low, high = max(col - left, 0), min(end - left, panel.cols)
                for first in range(low, high, BUFFER_BYTES // itemsize):
                    bits = self._panel(panel, row, 1, first, min(BUFFER_BYTES // itemsize, high - first))
                    yield dtype, memoryview(bits).cast("B")
                left += panel.cols
            start += end - col

    def _transpose(self, whole: Transpose, start: int, stop: int, spec: TensorSpec) -> Iterator[tuple[str, memoryview]]:
        """Elements [start, stop) of transposed panels, in their dtype, by strips of as many columns as STRIP_BYTES hold."""
        dtype, height = next(whole.reads()).dtype, whole.rows * len(whole.panels)
        itemsize = max(ITEMSIZE[dtype], ITEMSIZE[spec.dtype])
        step, limit = BUFFER_BYTES // itemsize, STRIP_BYTES // itemsize
        while start < stop:
            col, first = divmod(start, height)
            cols = min(min(limit, stop - start) // height, step) if first == 0 else 0
            last = height if cols else min(height, first + min(limit, stop - start))
            strip = self._strip(whole, col, cols or 1, first, last, dtype)
            for low in range(0, len(strip), step):
                yield dtype, memoryview(strip[low:low + step]).cast("B")
            start += len(strip)

    def _strip(self, whole: Transpose, col: int, cols: int, first: int, last: int, dtype: str) -> np.ndarray:
        """Elements [first, last) of each of the columns [col, col + cols) of all panels; shape [cols · (last - first)]."""
        strip, step = np.empty((cols, last - first), bits_dtype(dtype)), len(whole.panels)
        for number, panel in enumerate(whole.panels):
            low, high = (-((number - edge) // step) for edge in (first, last))
            for places, copy in panel:
                for part, bits in self._turned_parts(places, copy, Box(low, high - low, col, cols)):
                    at = part.row * step + number - first
                    strip[part.col - col:part.col - col + part.cols, at:at + part.rows * step:step] = bits
        return strip.reshape(-1)

    def _turned_parts(self, places: tuple[Box, ...], copy: Copy, inside: Box) -> Iterator[tuple[Box, np.ndarray]]:
        """What a copy that fills places of a panel gives of a box of it: the parts, each with its bits, of shape
        [cols, rows]."""
        for start, parts in _runs_inside(places, inside):
            wide = sum(part.cols for part in parts)
            for row, rows in _row_runs(parts[0], wide, copy):
                bits, left = self._panel(copy, row - places[0].row, rows, start, wide).T, 0
                for part in parts:
                    yield Box(row, rows, part.col, part.cols), bits[left:left + part.cols]
                    left += part.cols

    def _panel(self, panel: Copy, row: int, rows: int, col: int, cols: int) -> np.ndarray:
        """Rows [row, row + rows) × columns [col, col + cols) of a panel, its own first ones being 0; shape [rows, cols]."""
        whole, inside = Box(0, panel.rows, 0, panel.cols), Box(row, rows, col, cols)
        first = Twin(panel.file, panel.offset, panel.dtype, panel.pitch)
        bits = self._bits(first, whole, inside, self.buffer, panel.blocks[0][0].name)
        self._observe(panel, list(_parts(panel, inside)), bits, 0, whole, inside)
        return bits.reshape(rows, cols)

    def _bits(self, block: Twin, whole: Box, inside: Box, buffer: memoryview, name: str) -> np.ndarray:
        """The bits of a box inside a block as large as `whole`, whose first row and column are 0; shape [rows · cols]."""
        if block.turned:
            return self._turned_bits(block, whole, inside, name)
        pitch = block.pitch or whole.cols
        start = block.after(inside.row * pitch + inside.col)
        return self._rows(start, pitch, inside.rows, inside.cols, buffer, name)

    def _turned_bits(self, block: Twin, whole: Box, inside: Box, name: str) -> np.ndarray:
        """As _bits, of a block that lies transposed: by strips of as many of its columns as STRIP_BYTES hold."""
        known, strip, bits = self.strip
        if known != block or strip.intersect(inside) != inside:
            limit, high = (size // ITEMSIZE[block.dtype] for size in (BUFFER_BYTES, STRIP_BYTES))
            rows = min(max(high // inside.cols, inside.rows), limit, whole.rows - inside.row)
            strip, step = Box(inside.row, rows, inside.col, inside.cols), limit // rows
            bits = np.empty((rows, inside.cols), bits_dtype(block.dtype))
            for col in range(0, inside.cols, step):
                cols = min(step, inside.cols - col)
                start = block.after((inside.col + col) * block.pitch + inside.row)
                lying = self._rows(start, block.pitch, cols, rows, self.twin_buffer, name)
                bits[:, col:col + cols] = lying.reshape(cols, rows).T
            self.strip = block, strip, bits
        row, col = inside.row - strip.row, inside.col - strip.col
        return bits[row:row + inside.rows, col:col + inside.cols].reshape(-1)

    def _rows(self, start: Twin, pitch: int, rows: int, cols: int, buffer: memoryview, name: str) -> np.ndarray:
        """The bits of rows that begin `pitch` elements apart, from `start` on; shape [rows · cols]."""
        itemsize = ITEMSIZE[start.dtype]
        if rows == 1 or pitch == cols:
            return np.frombuffer(self._read(start.file, start.offset, rows * cols * itemsize, buffer, name),
                                 bits_dtype(start.dtype))
        bits = np.frombuffer(buffer[:rows * cols * itemsize], bits_dtype(start.dtype))
        nbytes = ((rows - 1) * pitch + cols) * itemsize
        if (pitch - cols) * itemsize > _GAP_BYTES or nbytes > len(self.span_buffer):
            for number in range(rows):
                self._read(start.file, start.offset + number * pitch * itemsize, cols * itemsize,
                           buffer[number * cols * itemsize:], name)
            return bits
        span = np.frombuffer(self._read(start.file, start.offset, nbytes, self.span_buffer, name), bits_dtype(start.dtype))
        np.copyto(bits.reshape(rows, cols), as_strided(span, (rows, cols), (pitch * itemsize, itemsize)))
        return bits

    def _progress(self, nbytes: int) -> None:
        self.unreported += nbytes
        if self.unreported >= REPORT_BYTES:
            self.report(self.unreported)
            self.unreported = 0

    def _read(self, path: str, offset: int, nbytes: int, buffer: memoryview, name: str) -> memoryview:
        """The bytes [offset, offset + nbytes) of a file, in `buffer`; zeros where there is no file."""
        if not path:
            return memoryview(bytes(nbytes))
        descriptor = self.files.get(path)
        if descriptor is None:
            descriptor = self.files[path] = os.open(path, os.O_RDONLY)
        view, got = buffer[:nbytes], 0
        while got < nbytes:
            count = os.preadv(descriptor, [view[got:]], offset + got)
            if count == 0:
                raise TaskError(f"{path}: ends before the last byte of {name}; it was cut since the plan was made")
            got += count
        return view

    # --------------------------------------------------------------------------------------------------- what is checked

    def _observe(self, copy: Copy, parts: list[_Part], bits: np.ndarray, start: int, whole: Box, inside: Box) -> None:
        """Compare and digest what was read of a copy: the box `inside` of what is as large as `whole` and begins `start`
        elements after the copy does."""
        def repeated(twin: Twin) -> np.ndarray:
            return self._bits(twin.after(start), whole, inside, self.twin_buffer, parts[0].tensor.name)

        if copy.twin is not None:
            model = repeated(copy.twin)
            self._take(self.outcome.misfits, copy, parts, lambda part: compare(
                part.tensor, part.of(bits), part.box, part.of(model), copy.twin.dtype))
        if copy.others:
            self._compare_others(copy, parts, bits, repeated)
        if copy.counted:
            self._take(self.outcome.non_finite, copy, parts, lambda part: non_finite(
                part.tensor, part.box, part.of(bits), copy.file))
            for part in parts:
                self._digest(part.tensor, copy, part.of(bits), part.box)
                if self.dtype != copy.dtype:
                    self._digest(_as(part.tensor, self.dtype), copy, cast(part.of(bits), copy.dtype, self.dtype), part.box)
        if self.dtype == "float16" != copy.dtype:
            self._take(self.outcome.overflown, copy, parts, lambda part: overflown(
                part.tensor, part.box, part.of(bits), copy.file))

    def _digest(self, tensor: Tensor, copy: Copy, bits: np.ndarray, box: Box) -> None:
        """Add the digest of what was read of a tensor, or of what that is written as."""
        digest, count = self.outcome.digests.get((tensor, copy.replica), (0, 0))
        digest += box_digest(bits, box, copy.turned)
        self.outcome.digests[tensor, copy.replica] = digest & MASK, count + box.numel

    def _compare_others(self, copy: Copy, parts: list[_Part], bits: np.ndarray,
                        repeated: Callable[[Twin], np.ndarray]) -> None:
        """Compare the copies of one box; where they differ and their mean is wanted, put it into `bits`."""
        first, others = bits.copy() if copy.mean else bits, []
        for other in copy.others:
            there = repeated(other)
            self._take(self.outcome.unequal, copy, parts, lambda part, there=there, other=other: unequal(
                part.tensor, part.box, part.of(first), part.of(there), other.file))
            if copy.mean:
                others.append(there.copy())
        if copy.mean:
            np.copyto(bits, mean_bits([first, *others], copy.dtype))

    def _take(self, known: dict, copy: Copy, parts: list[_Part], find: Callable[[_Part], Elements | None]) -> None:
        """Add what is found in the parts of a copy to what is known."""
        for found in filter(None, map(find, parts)):
            if copy.turned:
                found.turn()
            if known.setdefault(found.tensor, found) is not found:
                known[found.tensor].merge(found)


def _parts(panel: Copy, inside: Box) -> Iterator[_Part]:
    """What a box inside a panel is of the blocks that lie side by side there."""
    left = 0
    for tensor, box in panel.blocks:
        low, high = max(inside.col, left), min(inside.col + inside.cols, left + box.cols)
        if low < high:
            yield _Part(tensor, Box(box.row + inside.row, inside.rows, box.col + low - left, high - low),
                        slice(low - inside.col, high - inside.col))
        left += box.cols


def _reach(panel: Copy, cols: int) -> int:
    """The elements that `cols` of a row of a panel take in a buffer."""
    gap = (panel.pitch - cols) * ITEMSIZE[panel.dtype]
    return panel.pitch if panel.pitch and gap <= _GAP_BYTES else cols


def _runs_inside(places: tuple[Box, ...], inside: Box) -> list[tuple[int, list[Box]]]:
    """What of the places of a copy's columns is inside a box: the parts that lie side by side at the source together, each
    such run with the copy's column that it begins at."""
    runs: list[tuple[int, list[Box]]] = []
    left, end = 0, -1
    for place in places:
        if part := place.intersect(inside):
            start = left + part.col - place.col
            if start != end:
                runs.append((start, []))
            runs[-1][1].append(part)
            end = start + part.cols
        left += place.cols
    return runs


def _row_runs(part: Box, cols: int, copy: Copy) -> Iterator[tuple[int, int]]:
    """The rows of a part of a panel, as many at a time as fit a buffer if so many columns are read: (row, rows)."""
    rows = max(BUFFER_BYTES // ITEMSIZE[copy.dtype] // _reach(copy, cols), 1)
    return ((row, min(rows, part.row + part.rows - row)) for row in range(part.row, part.row + part.rows, rows))


def _chunks(start: int, stop: int, step: int, cols: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in runs of at most `step` elements that end at the end of a row, where a row fits."""
    while start < stop:
        high = start + step
        whole_rows = high - high % cols
        high = min(whole_rows if whole_rows > start else high, stop)
        yield start, high
        start = high
