"""Numpy's own files: written byte for byte as numpy.save writes them, and found again."""

import io
import os

import numpy as np
import pytest

from parammap.errors import RefusedError
from parammap.formats import npy
from parammap.formats.frames import Hole, Literal, total_nbytes, write
from parammap.tensors.logical import ITEMSIZE, TensorSpec

DTYPES = sorted(set(ITEMSIZE) - {"bfloat16"})
SHAPES = [(), (1,), (5,), (0,), (3, 0), (8, 12), (50272, 4), (2, 3, 5), (1, 1, 1, 1)]


def array(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)


def framed(value: np.ndarray, spec: TensorSpec) -> bytes:
    content, out = value.tobytes(), io.BytesIO()
    write(npy.frame(spec), lambda hole: [content[hole.start : hole.start + hole.nbytes]], out)
    return out.getvalue()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_numpy_saves_it(dtype, shape, tmp_path):
    value, spec, expected = array(dtype, shape), TensorSpec("x", dtype, shape), io.BytesIO()
    np.save(expected, value)
    assert framed(value, spec) == expected.getvalue()
    assert total_nbytes(npy.frame(spec)) == len(expected.getvalue())
    path = tmp_path / "decoder.weight"
    path.write_bytes(expected.getvalue())
    stored = npy.read(path)
    (extent,) = stored.extents
    assert (stored.dtype, stored.shape) == (dtype, shape)
    assert path.read_bytes()[extent.offset : extent.offset + extent.nbytes] == value.tobytes()


def test_a_known_content_is_no_hole():
    assert [type(segment) for segment in npy.frame(TensorSpec("x", "int32", (), b"\7\0\0\0"))] == [
        Literal
    ]
    assert [type(segment) for segment in npy.frame(TensorSpec("x", "int32", (2,)))] == [
        Literal,
        Hole,
    ]


def test_numpy_has_no_bfloat16():
    with pytest.raises(
        RefusedError, match="fc1.weight: numpy has no bfloat16; choose another dtype with --dtype"
    ):
        npy.frame(TensorSpec("fc1.weight", "bfloat16", (2, 2)))


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_both_versions_are_read(version, tmp_path):
    with open(tmp_path / "x", "wb") as out:
        np.lib.format.write_array(out, np.ones((3, 4), np.float16), version=version)
    assert npy.read(tmp_path / "x").shape == (3, 4)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.ones((3, 4), order="F"), "column-major array of <f8"),
        (np.ones(3, ">f4"), "array of >f4"),
        (np.array([None]), r"array of \|O"),
        (np.array(["text"]), "array of <U4"),
        (np.ones(2, np.complex64), "array of <c8"),
    ],
)
def test_what_is_no_plain_array_is_refused(value, what, tmp_path):
    np.save(tmp_path / "x.npy", value)
    with pytest.raises(RefusedError, match=f"x.npy: holds a {what}; save it row-major"):
        npy.read(tmp_path / "x.npy")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length_is_refused(change, tmp_path):
    np.save(tmp_path / "x.npy", np.ones(10))
    os.truncate(tmp_path / "x.npy", os.stat(tmp_path / "x.npy").st_size + change)
    with pytest.raises(
        RefusedError, match=rf"x.npy: has {208 + change} bytes and its header says 208"
    ):
        npy.read(tmp_path / "x.npy")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMP",
        b"PK\3\4 not numpy",
        b"\x93NUMPY\1\0\x10\0{'descr': nonsen",
        b"\x93NUMPY\7\0",
    ],
)
def test_no_numpy_file(content, tmp_path):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(RefusedError, match="x.npy: is no .npy file"):
        npy.read(tmp_path / "x.npy")


def test_no_file(tmp_path):
    with pytest.raises(RefusedError, match="x.npy: cannot be read"):
        npy.read(tmp_path / "x.npy")
