"""MindSpore .ckpt files, with MindSpore's save_checkpoint and load_checkpoint as the oracle, in
their own process."""

import importlib.util
import io
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parammap.errors import RefusedError
from parammap.formats import mindspore_ckpt
from parammap.formats.frames import write
from parammap.tensors.logical import ITEMSIZE, Stored, TensorSpec

needs_mindspore = pytest.mark.skipif(
    not importlib.util.find_spec("mindspore"), reason="no mindspore"
)

_COMMON = """
import json, sys
import numpy as np, mindspore as ms
folder = sys.argv[1]
def raw(value):
    array = value.asnumpy()
    return array.view(np.uint16) if value.dtype == ms.bfloat16 else array
"""

_SAVE = (
    _COMMON
    + """
source = dict(np.load(folder + "/source.npz"))
def tensor(name, array):
    if name == "bfloat16":
        return ms.Tensor(array, ms.bfloat16)
    return ms.Tensor(array)
params = [{"name": name, "data": tensor(name, array)} for name, array in source.items()]
extra = {"epoch_num": 7, "learning_rate": 0.5, "flag": True, "note": "h\\u00e9llo", "nothing": ""}
ms.save_checkpoint(params, folder + "/plain.ckpt")
ms.save_checkpoint(params, folder + "/crc.ckpt", crc_check=True)
ms.save_checkpoint(params, folder + "/extra.ckpt", append_dict=extra)
np.savez(folder + "/saved.npz", **{p["name"]: raw(p["data"]) for p in params})
json.dump({p["name"]: [str(p["data"].dtype), list(p["data"].shape)] for p in params}, open(folder + "/saved.json", "w"))
"""
)

_LOAD = (
    _COMMON
    + """
loaded = ms.load_checkpoint(folder + "/" + sys.argv[2], crc_check=sys.argv[3] == "crc")
np.savez(folder + "/loaded.npz", **{name: raw(value) for name, value in loaded.items()})
json.dump({name: [str(value.dtype), list(value.shape)] for name, value in loaded.items()},
          open(folder + "/loaded.json", "w"))
"""
)

_SAVE_LARGE = (
    _COMMON
    + """
large = np.arange(150_000_011, dtype=np.float32)
ms.save_checkpoint([{"name": "before", "data": ms.Tensor(np.ones(3, np.float16))},
                    {"name": "large", "data": ms.Tensor(large)},
                    {"name": "exact", "data": ms.Tensor(np.zeros(512 << 20, np.uint8))}], folder + "/large.ckpt")
"""
)


def _mindspore(script: str, *args) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder of files by save_checkpoint, and what they hold as plain arrays."""
    folder = tmp_path_factory.mktemp("mindspore")
    random = np.random.default_rng(1)
    source = {
        dtype: random.integers(0, 2, (3, 5)).astype("float32" if dtype == "bfloat16" else dtype)
        for dtype in ITEMSIZE
    }
    source |= {
        "scalar": np.float32(1.5),
        "one": np.ones((1,), np.int64),
        "a.b.weight": random.normal(size=(200, 300)),
        "a name of " + "900 characters " * 60: np.ones((1, 1, 2, 1), np.float16),
        "bytes.130": np.zeros(130, np.uint8),
    }
    np.savez(folder / "source.npz", **source)
    _mindspore(_SAVE, folder)
    return folder


def _specs(folder: Path) -> tuple[list[TensorSpec], list[bytes]]:
    kinds = json.loads((folder / "saved.json").read_text())
    with np.load(folder / "saved.npz") as arrays:
        contents = [arrays[name].tobytes() for name in kinds]
    dtypes = {"Bool": "bool"}
    specs = [
        TensorSpec(name, dtypes.get(kind, kind.lower()), tuple(shape))
        for name, (kind, shape) in kinds.items()
    ]
    return specs, contents


def _written(specs, contents, crc=False) -> bytes:
    out = io.BytesIO()
    write(
        mindspore_ckpt.frame(specs, crc),
        lambda hole: [contents[hole.tensor][hole.start : hole.start + hole.nbytes]],
        out,
    )
    return out.getvalue()


def _bytes_of(stored: Stored) -> bytes:
    parts = []
    for extent in stored.extents:
        with open(extent.file, "rb") as stream:
            stream.seek(extent.offset)
            parts.append(stream.read(extent.nbytes))
    return b"".join(parts)


def _refused(path) -> str:
    with pytest.raises(RefusedError) as caught:
        mindspore_ckpt.read(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return str(caught.value)


@needs_mindspore
@pytest.mark.parametrize("file, crc", [("plain.ckpt", False), ("crc.ckpt", True)])
def test_what_is_written_is_byte_for_byte_what_mindspore_writes(saved, file, crc):
    specs, contents = _specs(saved)
    assert {spec.dtype for spec in specs} == set(ITEMSIZE)
    assert _written(specs, contents, crc) == (saved / file).read_bytes()


@needs_mindspore
def test_content_given_with_the_spec_makes_the_same_file(saved):
    specs, contents = _specs(saved)
    known = [
        TensorSpec(spec.name, spec.dtype, spec.shape, content)
        for spec, content in zip(specs, contents, strict=True)
    ]
    (segment,) = mindspore_ckpt.frame(known)
    assert segment.data == (saved / "plain.ckpt").read_bytes()


@needs_mindspore
@pytest.mark.parametrize("crc", [False, True])
def test_mindspore_loads_what_is_written(saved, crc):
    specs, contents = _specs(saved)
    (saved / "ours.ckpt").write_bytes(_written(specs, contents, crc))
    _mindspore(_LOAD, saved, "ours.ckpt", "crc" if crc else "")
    assert json.loads((saved / "loaded.json").read_text()) == json.loads(
        (saved / "saved.json").read_text()
    )
    with np.load(saved / "loaded.npz") as loaded:
        assert [loaded[spec.name].tobytes() for spec in specs] == contents


@needs_mindspore
@pytest.mark.parametrize("file", ["plain.ckpt", "crc.ckpt", "extra.ckpt"])
def test_what_mindspore_writes_is_read(saved, file):
    read = mindspore_ckpt.read(saved / file)
    specs, contents = _specs(saved)
    assert list(read)[: len(specs)] == [spec.name for spec in specs]
    for spec, content in zip(specs, contents, strict=True):
        stored = read[spec.name]
        assert (stored.dtype, stored.shape, _bytes_of(stored)) == (spec.dtype, spec.shape, content)


@needs_mindspore
def test_appended_values_are_read(saved):
    read = mindspore_ckpt.read(saved / "extra.ckpt")
    assert (read["note"], read["nothing"]) == ("héllo", "")
    found = {
        name: (read[name].dtype, read[name].shape, _bytes_of(read[name]))
        for name in ("epoch_num", "learning_rate", "flag")
    }
    assert found == {
        "epoch_num": ("int64", (), np.int64(7).tobytes()),
        "flag": ("bool", (), b"\1"),
        "learning_rate": ("float32", (), np.float32(0.5).tobytes()),
    }


@needs_mindspore
@pytest.mark.full
def test_slices_of_512_mebibytes(tmp_path):
    _mindspore(_SAVE_LARGE, tmp_path)
    theirs = tmp_path / "large.ckpt"
    read = mindspore_ckpt.read(theirs)
    assert [len(stored.extents) for stored in read.values()] == [1, 2, 1]
    assert _bytes_of(read["large"]) == np.arange(150_000_011, dtype=np.float32).tobytes()
    specs = [TensorSpec(name, stored.dtype, stored.shape) for name, stored in read.items()]
    contents = [_bytes_of(stored) for stored in read.values()]
    with open(tmp_path / "ours.ckpt", "wb") as out:
        write(
            mindspore_ckpt.frame(specs),
            lambda hole: [memoryview(contents[hole.tensor])[hole.start :][: hole.nbytes]],
            out,
        )
    assert subprocess.run(["cmp", tmp_path / "ours.ckpt", theirs]).returncode == 0


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr(mindspore_ckpt, "_SLICE_NBYTES", 64)


SPECS = [
    TensorSpec("a", "float32", (40,)),
    TensorSpec("b", "int8", (64,)),
    TensorSpec("c", "int8", (2, 65)),
]
CONTENTS = [bytes(range(160)), bytes(64), bytes(range(130))]


@needs_mindspore
def test_mindspore_joins_slices(tmp_path, small_slices):
    (tmp_path / "ours.ckpt").write_bytes(_written(SPECS, CONTENTS))
    _mindspore(_LOAD, tmp_path, "ours.ckpt", "")
    with np.load(tmp_path / "loaded.npz") as loaded:
        assert [loaded[spec.name].tobytes() for spec in SPECS] == CONTENTS


def test_slices_are_joined(tmp_path, small_slices):
    (tmp_path / "ours.ckpt").write_bytes(_written(SPECS, CONTENTS))
    read = mindspore_ckpt.read(tmp_path / "ours.ckpt")
    assert [len(stored.extents) for stored in read.values()] == [3, 1, 3]
    assert [_bytes_of(stored) for stored in read.values()] == CONTENTS


def test_the_trailer_is_the_crc_of_all_bytes_before():
    content = _written(SPECS, CONTENTS, crc=True)
    assert content[-17:] == b"crc_num" + zlib.crc32(content[:-17]).to_bytes(10, "big")


@pytest.mark.parametrize(
    "specs, reason",
    [
        ([SPECS[0], SPECS[0]], "'a' is used twice"),
        ([SPECS[0], SPECS[1], SPECS[0]], "'a' is used twice"),
        ([TensorSpec("e", "int8", (2, 0))], "'e' is empty"),
    ],
)
def test_what_mindspore_would_lose_is_refused(specs, reason):
    with pytest.raises(RefusedError, match=reason):
        mindspore_ckpt.frame(specs)


def _record(name: bytes, dims: bytes, kind: bytes, content: bytes) -> bytes:
    def field(key, payload):
        assert len(payload) < 128
        return key + bytes([len(payload)]) + payload

    tensor = dims + field(b"\x12", kind) + field(b"\x1a", content)
    return field(b"\x0a", field(b"\x0a", name) + field(b"\x12", tensor))


A = _record(b"a", b"\x08\x02", b"Int8", b"xy")
B = _record(b"b", b"\x08\x01", b"Int8", b"z")


def test_a_record_made_by_hand(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(A + B + _record(b"s", b"\x08\x00", b"Float32", b"1234"))
    read = mindspore_ckpt.read(tmp_path / "a.ckpt")
    found = [(stored.shape, _bytes_of(stored)) for stored in read.values()]
    assert found == [((2,), b"xy"), ((1,), b"z"), ((), b"1234")]


@pytest.mark.parametrize(
    "content, reason",
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"PK\x03\x04" + bytes(100), "begins no tensor record", id="zip"),
        pytest.param(A + b"junk junk junk junk", "begins no tensor record", id="junk at the end"),
        pytest.param(A + b"crc_num" + bytes(9), "begins no tensor record", id="cut trailer"),
        pytest.param(b"crc_num" + bytes(10), "begins no tensor record", id="trailer only"),
        pytest.param(b"\xd8\x5e\x3a\x7f" + bytes(100), "is encrypted", id="encrypted"),
        pytest.param(
            b"\xd9\x5e\x3a\x7f" + bytes(100), "is encrypted", id="encrypted in another way"
        ),
        pytest.param(
            b"\xda\x5e\x3a\x7f" + bytes(100), "is encrypted", id="encrypted in a third way"
        ),
        pytest.param(A + B + A, "'a' occurs twice", id="name twice"),
        pytest.param(
            A + _record(b"a", b"\x08\x01", b"Int8", b"x"),
            "'a' occurs twice",
            id="slices of other dims",
        ),
        pytest.param(A + A, "has 4 bytes, its shape (2,) needs 2", id="adjacent name twice"),
        pytest.param(
            _record(b"a", b"\x08\x04", b"Int8", b"xy") + B,
            "its shape (4,) needs 4",
            id="slice lost",
        ),
        pytest.param(
            _record(b"a", b"\x08" + b"\xff" * 9 + b"\x01", b"Int8", b"xy"),
            "begins no tensor record",
            id="negative dim",
        ),
        pytest.param(_record(b"a", b"\x08\x02", b"Int4", b"xy"), "type 'Int4'", id="type"),
        pytest.param(
            _record(b"a", b"\x08\x00", b"str", b"\xff\xff\xff\xff"),
            "not a valid string",
            id="string",
        ),
        pytest.param(
            _record(b"\xff\xfe", b"\x08\x02", b"Int8", b"xy"), "begins no tensor record", id="name"
        ),
        pytest.param(b"\x0a\x05\x0a\x01a\x1a\x00", "holds map tensors", id="map tensor"),
        pytest.param(b"\x0a" + b"\xff" * 11, "begins no tensor record", id="endless varint"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, reason):
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(content)
    assert reason in _refused(path)


def test_a_missing_file_is_refused(tmp_path):
    assert "cannot be read" in _refused(tmp_path / "missing.ckpt")


@pytest.mark.parametrize("cut", [n for n in range(1, len(A + B)) if n != len(A)])
def test_a_file_cut_inside_a_record_is_refused(tmp_path, cut):
    (tmp_path / "cut.ckpt").write_bytes((A + B)[:cut])
    assert "truncated" in _refused(tmp_path / "cut.ckpt")


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_within_its_bounds_or_refused(tmp_path, flips):
    content, path = bytearray(_written(SPECS, CONTENTS, crc=True)), tmp_path / "flipped.ckpt"
    for position, byte in flips:
        content[position % len(content)] = byte
    path.write_bytes(content)
    try:
        read = mindspore_ckpt.read(path)
    except RefusedError:
        return
    for stored in read.values():
        for extent in () if isinstance(stored, str) else stored.extents:
            assert 0 <= extent.offset <= extent.offset + extent.nbytes <= len(content)
