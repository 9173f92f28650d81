"""Writing one output file: streamed through fixed buffers, hashed and checked on the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .checks import Misfit, NonFinite, Unequal, cast, compare, mean_bits, non_finite, unequal
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
    """What a task found out: per (tensor, replica) the digest and the number of its elements; misfits; replicas that
    differ; what is not finite; bytes written."""

    path: str
    nbytes: int
    digests: dict[tuple[Tensor, int], tuple[int, int]] = field(default_factory=dict)
    misfits: dict[Tensor, Misfit] = field(default_factory=dict)
    unequal: dict[Tensor, Unequal] = field(default_factory=dict)
    non_finite: dict[Tensor, NonFinite] = field(default_factory=dict)


class Writer:
    """Writes one task's file front to back."""

    def __init__(self, task: FileTask, out: BinaryIO, report: Callable[[int], None]) -> None:
        self.task, self.out, self.report = task, out, report
        self.unreported = 0
        self.outcome = Outcome(task.path, task.nbytes)
        self.files: dict[str, int] = {}
        self.streams = {Copy: self._stream, Weave: self._weave, Transpose: self._transpose}
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
        itemsize = ITEMSIZE[spec.dtype]
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
                    part = data[at * ITEMSIZE[copy.dtype]:(at + box.numel) * ITEMSIZE[copy.dtype]]
                    self._observe(copy, tensor, whole, position, box, np.frombuffer(part, bits_dtype(copy.dtype)))
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
            for place, copy in panel:
                part = place.intersect(Box(low, high - low, col, cols))
                for row, rows in _row_runs(part, copy) if part else ():
                    bits = self._panel(copy, row - place.row, rows, part.col - place.col, part.cols)
                    at = row * step + number - first
                    strip[part.col - col:part.col - col + part.cols, at:at + rows * step:step] = bits.T
        return strip.reshape(-1)

    def _panel(self, panel: Copy, row: int, rows: int, col: int, cols: int) -> np.ndarray:
        """Rows [row, row + rows) × columns [col, col + cols) of a panel, its own first ones being 0; shape [rows, cols]."""
        (tensor, whole), = panel.blocks
        box = Box(whole.row + row, rows, whole.col + col, cols)
        bits = self._bits(Twin(panel.file, panel.offset, panel.dtype, panel.pitch), tensor, whole, box, self.buffer)
        self._observe(panel, tensor, whole, 0, box, bits)
        return bits.reshape(rows, cols)

    def _bits(self, block: Twin, tensor: Tensor, whole: Box, box: Box, buffer: memoryview) -> np.ndarray:
        """The bits of a box inside the block `whole`, which begins at `block`; shape [rows · cols]."""
        pitch = block.pitch or whole.cols
        start = block.after((box.row - whole.row) * pitch + box.col - whole.col)
        return self._rows(start, pitch, box.rows, box.cols, buffer, tensor.name)

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

    def _observe(self, copy: Copy, tensor: Tensor, whole: Box, start: int, box: Box, bits: np.ndarray) -> None:
        """Compare and digest the elements of `box`, which `bits` holds, row-major; it is inside `whole`, a block that begins
        `start` elements after the copy does."""
        if copy.twin is not None:
            model = self._bits(copy.twin.after(start), tensor, whole, box, self.twin_buffer)
            _merge(self.outcome.misfits, compare(tensor, bits, box, model, copy.twin.dtype))
        if copy.others:
            self._compare_others(copy, tensor, whole, start, box, bits)
        if copy.counted:
            _merge(self.outcome.non_finite, non_finite(tensor, box, bits, copy.file))
            key = tensor, copy.replica
            digest, count = self.outcome.digests.get(key, (0, 0))
            self.outcome.digests[key] = (digest + box_digest(bits, box)) & MASK, count + box.numel

    def _compare_others(self, copy: Copy, tensor: Tensor, whole: Box, start: int, box: Box, bits: np.ndarray) -> None:
        """Compare the copies of one box; where they differ and their mean is wanted, put it into `bits`."""
        first, others = bits.copy() if copy.mean else bits, []
        for other in copy.others:
            there = self._bits(other.after(start), tensor, whole, box, self.twin_buffer)
            _merge(self.outcome.unequal, unequal(tensor, box, first, there, other.file))
            if copy.mean:
                others.append(there.copy())
        if copy.mean:
            np.copyto(bits, mean_bits([first, *others], copy.dtype))


def _merge(known: dict, found: Misfit | Unequal | NonFinite | None) -> None:
    if found is not None and known.setdefault(found.tensor, found) is not found:
        known[found.tensor].merge(found)


def _reach(panel: Copy, cols: int) -> int:
    """The elements that `cols` of a row of a panel take in a buffer."""
    gap = (panel.pitch - cols) * ITEMSIZE[panel.dtype]
    return panel.pitch if panel.pitch and gap <= _GAP_BYTES else cols


def _row_runs(part: Box, copy: Copy) -> Iterator[tuple[int, int]]:
    """The rows of a part of a copy's box, as many at a time as fit a buffer: (row, rows)."""
    rows = max(BUFFER_BYTES // ITEMSIZE[copy.dtype] // _reach(copy, part.cols), 1)
    return ((row, min(rows, part.row + part.rows - row)) for row in range(part.row, part.row + part.rows, rows))


def _chunks(start: int, stop: int, step: int, cols: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in runs of at most `step` elements that end at the end of a row, where a row fits."""
    while start < stop:
        high = start + step
        whole_rows = high - high % cols
        high = min(whole_rows if whole_rows > start else high, stop)
        yield start, high
        start = high
