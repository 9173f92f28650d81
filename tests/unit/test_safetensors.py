"""safetensors files, with the library and MindSpore's own reader as oracles."""

import importlib.util
import io
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from parammap.errors import RefusedError
from parammap.formats import safetensors as container
from parammap.formats.frames import write
from parammap.tensors.logical import ITEMSIZE, Stored, TensorSpec


def _tensors() -> dict[str, torch.Tensor]:
    every = {
        f"every.{dtype}": torch.randint(0, 2, (3, 5)).to(getattr(torch, dtype))
        for dtype in ITEMSIZE
    }
    return {
        "layers.10.w": torch.randn(2, 3),
        "layers.9.w": torch.randn(2, 3),
        'odd "näme"\n': torch.randn(1),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0),
        "empty.2": torch.zeros(2, 0, dtype=torch.int8),
    } | every


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _framed(tensors: dict[str, torch.Tensor], metadata=None) -> bytes:
    specs = [
        TensorSpec(name, str(tensor.dtype)[6:], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    contents = [_bits(tensor) for tensor in tensors.values()]
    out = io.BytesIO()
    write(
        container.frame(specs, metadata),
        lambda hole: [contents[hole.tensor][hole.start : hole.start + hole.nbytes]],
        out,
    )
    return out.getvalue()


def _bytes_of(stored: Stored) -> bytes:
    (extent,) = stored.extents
    with open(extent.file, "rb") as stream:
        stream.seek(extent.offset)
        return stream.read(extent.nbytes)


def _refused(path) -> str:
    with pytest.raises(RefusedError) as caught:
        container.read(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("metadata", [None, {"format": "ms"}])
def test_what_is_written_is_byte_for_byte_what_the_library_writes(metadata):
    tensors = _tensors()
    assert _framed(tensors, metadata) == safetensors.torch.save(tensors, metadata)


def test_the_library_reads_what_is_written(tmp_path):
    tensors = _tensors()
    (tmp_path / "ours.safetensors").write_bytes(_framed(tensors, {"format": "ms"}))
    with safe_open(tmp_path / "ours.safetensors", "pt") as ours:
        assert ours.metadata() == {"format": "ms"} and set(ours.keys()) == set(tensors)
        for name, tensor in tensors.items():
            read = ours.get_tensor(name)
            assert (read.dtype, read.shape, _bits(read)) == (
                tensor.dtype,
                tensor.shape,
                _bits(tensor),
            )


def test_what_the_library_writes_is_read(tmp_path):
    tensors, path = _tensors(), str(tmp_path / "theirs.safetensors")
    safetensors.torch.save_file(tensors, path, {"a": "b"})
    read = container.read(path)
    assert container.read_metadata(path) == {"a": "b"} and set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (str(tensor.dtype)[6:], tuple(tensor.shape))
        assert _bytes_of(read[name]) == _bits(tensor)


def test_a_file_without_tensors_or_metadata(tmp_path):
    path = str(tmp_path / "empty.safetensors")
    safetensors.torch.save_file({}, path)
    assert container.read(path) == {} and container.read_metadata(path) == {}


def test_content_that_is_known_becomes_literal():
    value = np.float32(2.5).tobytes()
    (segment,) = container.frame([TensorSpec("lr", "float32", (), value)])
    assert segment.data.endswith(value)


@pytest.mark.parametrize(
    "names, metadata", [(["a", "a"], {}), (["format"], {"format": "ms"}), (["__metadata__"], {})]
)
def test_names_that_collide_are_refused(names, metadata):
    with pytest.raises(RefusedError, match="used twice"):
        container.frame([TensorSpec(name, "int8", (1,)) for name in names], metadata)


_MINDSPORE = """
import sys
import numpy as np, mindspore as ms
loaded = ms.load_checkpoint(sys.argv[1], format="safetensors")
np.savez(sys.argv[2], **{name: value.asnumpy().view(np.uint8) if value.dtype == ms.bfloat16 else value.asnumpy()
                         for name, value in loaded.items()})
"""


@pytest.mark.skipif(not importlib.util.find_spec("mindspore"), reason="no mindspore")
def test_mindspore_reads_what_is_written(tmp_path):
    tensors = {
        name: tensor for name, tensor in _tensors().items() if tensor.numel() and "odd" not in name
    }
    ours, loaded = str(tmp_path / "ours.safetensors"), str(tmp_path / "loaded.npz")
    (tmp_path / "ours.safetensors").write_bytes(_framed(tensors, {"format": "ms"}))
    subprocess.run(
        [sys.executable, "-c", _MINDSPORE, ours, loaded], check=True, capture_output=True
    )
    with np.load(loaded) as arrays:
        assert set(arrays) == set(tensors)
        for name, tensor in tensors.items():
            assert arrays[name].tobytes() == _bits(tensor)


def _raw(header: bytes | dict, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(begin: int, end: int, shape=(1,), dtype="U8") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content, reason",
    [
        pytest.param(b"", "not a safetensors file", id="empty file"),
        pytest.param(b"PK\x03\x04" * 30, "not a safetensors file", id="zip"),
        pytest.param(
            struct.pack("<Q", 2**63) + b"{}", "not a safetensors file", id="header length"
        ),
        pytest.param(_raw(b"{"), "not valid JSON", id="cut JSON"),
        pytest.param(_raw(b"[1]"), "an array and not object", id="list"),
        pytest.param(_raw(b"[" * 100000), "not valid JSON", id="deep JSON"),
        pytest.param(_raw(b"\xff{}"), "not valid JSON", id="encoding"),
        pytest.param(_raw(b'{"a":1,"a":1}'), "occurs twice", id="key twice"),
        pytest.param(_raw({"a": {"dtype": "U8"}}), "lacks shape", id="no shape"),
        pytest.param(_raw({"a": 3}), "3 and not object", id="no entry"),
        pytest.param(_raw({"a": _entry(0, 1, dtype="F8_E4M3")}, b"x"), "'F8_E4M3'", id="dtype"),
        pytest.param(
            _raw({"a": _entry(0, 1, dtype=[])}, b"x"),
            "dtype is an array",
            id="dtype that is a list",
        ),
        pytest.param(_raw({"a": _entry(0, 1, (2,))}, b"x"), "needs 2", id="size"),
        pytest.param(_raw({"a": _entry(0, 1, (-1, -1))}, b"x"), "-1 and not from 0", id="negative"),
        pytest.param(
            _raw({"a": _entry(0, 1, (True,))}, b"x"), "True and not integer", id="boolean"
        ),
        pytest.param(_raw({"a": _entry(0, 1), "b": _entry(0, 1)}, b"x"), "overlaps", id="overlap"),
        pytest.param(_raw({"a": _entry(1, 2)}, b"xy"), "gap", id="gap"),
        pytest.param(_raw({"a": _entry(0, 1)}, b""), "truncated", id="cut data"),
        pytest.param(_raw({"a": _entry(0, 1)}, b"xy"), "truncated or damaged", id="more data"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, reason):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    assert reason in _refused(str(path))


def test_a_missing_file_is_refused(tmp_path):
    assert "cannot be read" in _refused(str(tmp_path / "missing"))


@given(st.integers(0, 10**6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_is_refused(tmp_path, cut):
    content, path = _framed(_tensors()), tmp_path / "cut.safetensors"
    path.write_bytes(content[: cut % len(content)])
    _refused(str(path))
