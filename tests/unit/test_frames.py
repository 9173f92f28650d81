"""Frames: segments are written in one pass, and checksums are those of zlib over the file that
results."""

import io
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parammap.formats.frames import Crc, FrameBuilder, Hole, Literal, place, total_nbytes, write
from parammap.tensors.logical import TensorSpec

PARTS = st.lists(st.tuples(st.booleans(), st.binary(max_size=40)), min_size=1, max_size=12)


def _chunks(data: bytes, size: int):
    return [data[start : start + size] for start in range(0, len(data), size)]


@given(PARTS, st.integers(1, 7), st.data())
def test_a_frame_is_written_as_planned(parts, chunk, data):
    builder, contents, ends = FrameBuilder(), [], [0]
    for is_hole, content in parts:
        if is_hole:
            builder.content(
                len(contents), TensorSpec("t", "uint8", (len(content),)), 0, len(content)
            )
            contents.append(content)
        else:
            builder.literal(content)
        ends.append(builder.position)
        start, end = sorted([data.draw(st.sampled_from(ends)), data.draw(st.sampled_from(ends))])
        builder.crc(start, end, 4, "little")
        ends.append(builder.position)
    segments, out = builder.segments(), io.BytesIO()
    write(segments, lambda hole: _chunks(contents[hole.tensor], chunk), out)
    written = out.getvalue()
    assert len(written) == total_nbytes(segments) == builder.position
    for position, segment in place(segments):
        piece = written[position : position + segment.nbytes]
        if isinstance(segment, Literal):
            assert piece == segment.data
        elif isinstance(segment, Hole):
            assert piece == contents[segment.tensor]
        else:
            assert piece == zlib.crc32(written[segment.start : segment.end]).to_bytes(4, "little")


def test_content_that_is_known_becomes_literal():
    builder = FrameBuilder()
    builder.literal(b"<")
    builder.content(0, TensorSpec("step", "int32", (), b"\1\0\0\0"), 0, 4)
    builder.literal(b">")
    assert builder.segments() == [Literal(b"<\1\0\0\0>")]


def test_data_of_another_length_than_its_tensor_is_an_error():
    with pytest.raises(ValueError, match="step"):
        FrameBuilder().content(0, TensorSpec("step", "int64", (), b"\1\0\0\0"), 0, 8)


@pytest.mark.parametrize("given_nbytes", [3, 5])
def test_a_hole_filled_with_too_few_or_many_bytes_is_an_error(given_nbytes):
    with pytest.raises(ValueError, match="filled with"):
        write([Hole(0, 0, 4)], lambda hole: [b"x" * given_nbytes], io.BytesIO())


def test_a_crc_is_written_in_the_width_and_order_asked_for():
    out = io.BytesIO()
    write([Literal(b"abc"), Crc(1, 3, 10, "big")], lambda hole: [], out)
    assert out.getvalue() == b"abc" + zlib.crc32(b"bc").to_bytes(10, "big")
