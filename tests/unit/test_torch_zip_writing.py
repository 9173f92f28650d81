"""Writing checkpoints that torch.load reads, with torch.save and torch.load as the oracle."""

import argparse
import collections
import io
import math
import pickletools
import shutil
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from parammap.formats import torch_zip, zip_records
from parammap.formats.frames import Frame, Hole, place, write
from parammap.formats.zip_records import Record
from parammap.tensors.logical import ITEMSIZE, TensorSpec
from tests.support import paths

GOLDENS = sorted((paths.TESTS / "data" / "megatron").glob("*/iter_*/mp_rank_*/*.pt"))
IDS = ["/".join(path.parts[-4:]) for path in GOLDENS]


class Recorded:
    """Stands for any class of a framework: keeps what it was made of."""

    def __init__(self, *args):
        self.args = args


@pytest.fixture
def framework_classes(monkeypatch):
    """Puts a stand-in into sys.modules for each global in a file whose module is not installed."""

    def install(path):
        for module, name in _globals(path):
            if module.split(".")[0] in ("megatron", "apex", "deepspeed"):
                for parent in _parents(module):
                    if parent not in sys.modules:
                        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
                setattr(sys.modules[module], name, type(name, (Recorded,), {"__module__": module}))

    return install


def _globals(path) -> set[tuple[str, str]]:
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        ops = list(pickletools.genops(archive.read(name)))
    return {tuple(argument.split(" ")) for op, argument, _ in ops if op.name == "GLOBAL"}


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _write(frame: Frame, path, contents=None) -> str:
    """Fill holes from the source (Stored) or from `contents` (by TensorSpec name)."""

    def fill(hole: Hole):
        tensor = frame.tensors[hole.tensor]
        if isinstance(tensor, TensorSpec):
            yield contents[tensor.name][hole.start : hole.start + hole.nbytes]
            return
        (extent,) = tensor.extents
        with open(extent.file, "rb") as stream:
            stream.seek(extent.offset + hole.start)
            yield stream.read(hole.nbytes)

    with open(path, "wb") as out:
        write(frame.segments, fill, out)
    return str(path)


def _rewritten(source, target) -> str:
    return _write(torch_zip.frame(torch_zip.read(source), str(target)), target)


def _same(a, b) -> bool:
    """Whether two trees that torch.load gave are equal in every type, key order and bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and _bits(a) == _bits(b)
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return (
            list(a) == list(b)
            and all(_same(a[key], b[key]) for key in a)
            and _same_attributes(a, b)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, io.BytesIO):
        return (a.getvalue(), a.tell()) == (b.getvalue(), b.tell())
    if isinstance(a, (Recorded, argparse.Namespace)):
        return _same_attributes(a, b)
    return a == b or isinstance(a, float) and math.isnan(a) and math.isnan(b)


def _same_attributes(a, b) -> bool:
    ours, theirs = getattr(a, "__dict__", None), getattr(b, "__dict__", None)
    return ours == theirs or bool(ours) and bool(theirs) and _same(dict(ours), dict(theirs))


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _check_archive(path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert all(extent.offset % 64 == 0 for extent in zip_records.read(path).values())


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("path", GOLDENS, ids=IDS)
def test_real_checkpoints_of_megatron_come_back(tmp_path, framework_classes, path, mmap):
    framework_classes(path)
    ours = _rewritten(path, tmp_path / "ours.pt")
    _check_archive(ours)
    original = torch.load(path, weights_only=False)
    assert _same(torch.load(ours, weights_only=False, mmap=mmap), original)
    _spoil(original)
    assert not _same(torch.load(ours, weights_only=False), original)


def _spoil(tree) -> None:
    """Flip one bit of the last tensor in the tree."""
    _tensors(tree)[-1].reshape(-1).view(torch.uint8)[-1] ^= 1


def _tensors(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = (
        tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    )
    return [tensor for part in parts for tensor in _tensors(part)]


def _tree() -> dict:
    state = torch.nn.Linear(3, 4).state_dict()
    state["_extra_state"] = io.BytesIO(b"abc")
    return {
        "model": state,
        "args": argparse.Namespace(lr=1e-4, dtype=torch.bfloat16, x=None),
        "size": torch.Size([2, 3]),
        "rng": np.random.RandomState(1).get_state(),
        "lr": np.float64(0.1),
        "ordered": collections.OrderedDict(b=1, a=2),
        "every": {
            dtype: torch.randint(0, 2, (3, 5)).to(getattr(torch, dtype)) for dtype in ITEMSIZE
        },
        "odd": [torch.tensor(3.5), torch.zeros(0), torch.zeros(2, 0, 3), torch.ones(1, 3, 1)],
        "none": None,
        "plain": [
            1,
            -1,
            2**70,
            1.5,
            True,
            "é",
            b"\xff",
            (1, 2),
            {3},
            frozenset({4}),
            1j,
            bytearray(b"x"),
            range(3),
        ],
    }


@pytest.mark.parametrize("mmap", [False, True])
def test_every_type_comes_back(tmp_path, mmap):
    torch.save(_tree(), tmp_path / "source.pt")
    ours = _rewritten(tmp_path / "source.pt", tmp_path / "ours.pt")
    _check_archive(ours)
    original = torch.load(tmp_path / "source.pt", weights_only=False)
    assert _same(torch.load(ours, weights_only=False, mmap=mmap), original)


@pytest.mark.parametrize(
    "path", [path for path in GOLDENS if path.name == "distrib_optim.pt"][:2], ids=str
)
def test_what_holds_tensors_only_loads_with_weights_only(tmp_path, path):
    ours = _rewritten(path, tmp_path / "ours.pt")
    assert _same(torch.load(ours, weights_only=True), torch.load(path, weights_only=True))


def test_the_archive_is_byte_for_byte_that_of_torch(tmp_path):
    path = tmp_path / "source.pt"
    torch.save(_tree(), path)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    holes = [content for name, content in contents.items() if "/data/" in name]
    records, count = [], 0
    for name, content in contents.items():
        if content in holes and "/data/" in name:
            records.append(Record(name, (count, TensorSpec(name, "uint8", (len(content),)))))
            holes[count] = content
            count += 1
        else:
            records.append(Record(name, content))
    out = io.BytesIO()
    write(zip_records.frame(records), lambda hole: [holes[hole.tensor]], out)
    assert count > 10 and out.getvalue() == path.read_bytes()


def test_records_are_named_as_torch_names_them(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "model.optim.pt")
    ours = _rewritten(tmp_path / "model.optim.pt", tmp_path / "model.optim.bin")
    with zipfile.ZipFile(tmp_path / "model.optim.pt") as theirs, zipfile.ZipFile(ours) as archive:
        extra = {"model.optim/.data/serialization_id"}
        assert set(archive.namelist()) == set(theirs.namelist()) - extra


def test_tensors_given_as_specs(tmp_path):
    weight, bias = torch.randn(3, 4), torch.randn(4).bfloat16()
    one, other = TensorSpec("w", "float32", (3, 4)), TensorSpec("b", "bfloat16", (4,))
    step = TensorSpec("step", "int64", (), (2**40).to_bytes(8, "little"))
    frame = torch_zip.frame({"a": {"weight": one}, "b": [other, one], "step": step})
    assert frame.tensors == [one, other, step]
    ours = _write(frame, tmp_path / "ours.pt", {"w": _bits(weight), "b": _bits(bias)})
    _check_archive(ours)
    read = torch.load(ours)
    assert _same(read, {"a": {"weight": weight}, "b": [bias, weight], "step": torch.tensor(2**40)})
    assert read["a"]["weight"].data_ptr() == read["b"][1].data_ptr()


def test_two_specs_of_one_name_are_two_tensors():
    specs = [TensorSpec("weight", "float32", (1,)) for _ in range(2)]
    assert len(torch_zip.frame({"a": specs[0], "b": specs[1]}).tensors) == 2


def test_the_place_of_each_tensor_is_known_at_plan_time(tmp_path):
    frame = torch_zip.frame([TensorSpec("a", "uint8", (100,)), TensorSpec("b", "uint8", (7,))])
    ours = _write(frame, tmp_path / "ours.pt", {"a": b"a" * 100, "b": b"b" * 7})
    offsets = [position for position, segment in place(frame.segments) if isinstance(segment, Hole)]
    assert offsets == [stored.extents[0].offset for stored in torch_zip.read(ours)]


@pytest.mark.parametrize("leaf", [torch.zeros(2), np.zeros(2), object(), Recorded()])
def test_leaves_of_other_types_are_an_error(leaf):
    with pytest.raises(TypeError, match="cannot be written"):
        torch_zip.frame({"a": leaf})


@pytest.mark.skipif(not shutil.which("unzip"), reason="no unzip")
def test_unzip_finds_no_fault(tmp_path):
    torch.save(_tree(), tmp_path / "source.pt")
    ours = _rewritten(tmp_path / "source.pt", tmp_path / "ours.pt")
    assert subprocess.run(["unzip", "-tq", ours], capture_output=True).returncode == 0


@pytest.mark.full
def test_records_past_four_gibibytes(tmp_path):
    """Byte for byte as torch's own writer: 64-bit sizes, and 64-bit offsets of what follows."""
    large = torch.zeros((1 << 32) + 5, dtype=torch.uint8)
    theirs = str(tmp_path / "big.pt")
    torch.save([large, torch.arange(3)], theirs)
    shape, contents = tuple(large.shape), zip_records.read(theirs)
    records, tensors = [], [TensorSpec("large", "uint8", shape)]
    for name, extent in contents.items():
        is_large = extent.nbytes == shape[0]
        records.append(
            Record(name, (0, tensors[0]) if is_large else zip_records.read_record(extent))
        )
    zeros = bytes(1 << 20)
    ours = str(tmp_path / "ours.pt")
    with open(ours, "wb") as out:
        write(zip_records.frame(records), lambda hole: _zeros(zeros, hole.nbytes), out)
    assert subprocess.run(["cmp", ours, theirs]).returncode == 0
    assert [stored.shape for stored in torch_zip.read(ours)] == [shape, (3,)]
    assert torch.equal(torch.load(ours, mmap=True)[1], torch.arange(3))


def _zeros(zeros: bytes, nbytes: int):
    while nbytes:
        yield zeros[:nbytes]
        nbytes -= min(len(zeros), nbytes)
