"""What an output file consists of, decided before it is written.

A container turns tensors into *segments* in file order: bytes that are known already, holes that
the executor fills by streaming, and checksums over bytes that have been written by then. Every
segment has a known length, so the size of the file and the place of every tensor in it are known at
plan time, and one sequential pass writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal as OneOf
from typing import Protocol, TypeAlias

from parammap.formats.crc32 import combine, crc32
from parammap.tensors.logical import Stored, TensorSpec

Chunk: TypeAlias = bytes | memoryview


class Sink(Protocol):
    """What a file is written to, front to back."""

    def write(self, data: Chunk, /) -> object: ...


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes known at plan time."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Hole:
    """Bytes [start, start + nbytes) of the row-major content of a tensor; `tensor` counts the
    tensors framed."""

    tensor: int
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Crc:
    """CRC-32 (zlib) of the file's bytes [start, end), all of which lie before it, as an unsigned
    integer."""

    start: int
    end: int
    nbytes: int
    byteorder: OneOf["little", "big"]


Segment = Literal | Hole | Crc


@dataclass(frozen=True, slots=True)
class Frame:
    """An output file: its segments, and the tensors that their holes count."""

    segments: list[Segment]
    tensors: list[TensorSpec | Stored]


def place(segments: Iterable[Segment]) -> Iterator[tuple[int, Segment]]:
    """Each segment with its byte offset in the file."""
    position = 0
    for segment in segments:
        yield position, segment
        position += segment.nbytes


def total_nbytes(segments: Iterable[Segment]) -> int:
    """The size of the file, in bytes."""
    return sum(segment.nbytes for segment in segments)


class FrameBuilder:
    """Collects segments in file order; runs of literal bytes become one segment."""

    def __init__(self) -> None:
        self.position = 0
        self._segments: list[Segment] = []
        self._run = bytearray()

    def literal(self, data: bytes) -> None:
        self._run += data
        self.position += len(data)

    def crc(self, start: int, end: int, nbytes: int, byteorder: OneOf["little", "big"]) -> None:
        self._append(Crc(start, end, nbytes, byteorder))

    def content(self, index: int, spec: TensorSpec, start: int, nbytes: int) -> None:
        """Bytes [start, start + nbytes) of tensor `index`: its own `data` where it has some, else a
        hole.

        Raises ValueError if that data is not as long as the tensor.
        """
        if spec.data is not None:
            if len(spec.data) != spec.nbytes:
                raise ValueError(
                    f"{spec.name}: data has {len(spec.data)} bytes, the tensor {spec.nbytes}"
                )
            self.literal(spec.data[start : start + nbytes])
        elif nbytes:
            self._append(Hole(index, start, nbytes))

    def segments(self) -> list[Segment]:
        self._flush()
        return self._segments

    def _append(self, segment: Segment) -> None:
        self._flush()
        self._segments.append(segment)
        self.position += segment.nbytes

    def _flush(self) -> None:
        if self._run:
            self._segments.append(Literal(bytes(self._run)))
            self._run.clear()


class Checksums:
    """The CRC-32 of a file, and those that its frame asks for, fed with the file's bytes in file
    order."""

    def __init__(self, segments: Iterable[Segment]) -> None:
        crcs = [segment for segment in segments if isinstance(segment, Crc)]
        self._marks = sorted({at for crc in crcs for at in (crc.start, crc.end)}, reverse=True)
        #: of all that lies before a byte, by that byte
        self._before = {0: 0}
        self.crc32 = 0

    def update(self, position: int, data: Chunk) -> None:
        """Take in `data`, which begins at byte `position` of the file."""
        data, done = memoryview(data), 0
        while self._marks and self._marks[-1] <= position + len(data):
            mark = self._marks.pop()
            self.crc32 = crc32(data[done : mark - position], self.crc32)
            self._before[mark], done = self.crc32, mark - position
        self.crc32 = crc32(data[done:], self.crc32)

    def encode(self, crc: Crc) -> bytes:
        """The bytes of segment `crc`, once everything before it has been taken in."""
        before, both = self._before[crc.start], self._before[crc.end]
        value = combine(before, both, crc.end - crc.start)
        return value.to_bytes(crc.nbytes, crc.byteorder)


def write(segments: Sequence[Segment], fill: Callable[[Hole], Iterable[Chunk]], out: Sink) -> int:
    """Write a file from its start; `fill` yields the bytes of a hole, in order and in chunks of any
    size. Returns the file's CRC-32.

    Raises ValueError if `fill` yields another number of bytes than the hole has.
    """
    checksums = Checksums(segments)
    for position, segment in place(segments):
        done = position
        for chunk in _chunks(segment, fill, checksums):
            checksums.update(done, chunk)
            out.write(chunk)
            done += len(chunk)
        if done - position != segment.nbytes:
            raise ValueError(f"{segment} was filled with {done - position} bytes")
    return checksums.crc32


def _chunks(
    segment: Segment, fill: Callable[[Hole], Iterable[Chunk]], checksums: Checksums
) -> Iterable[Chunk]:
    if isinstance(segment, Hole):
        return fill(segment)
    return [segment.data if isinstance(segment, Literal) else checksums.encode(segment)]
