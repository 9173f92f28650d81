"""torch's format from before 1.6, and strided matrices in files of both kinds; what lies where is
what torch loads."""

import argparse
import io
import pickle
import struct
from collections import OrderedDict

import pytest
import torch

from parammap.errors import RefusedError
from parammap.formats import torch_legacy, torch_zip
from parammap.formats.frames import Hole, write
from parammap.formats.pickles import Opaque
from parammap.tensors.logical import Stored, TensorSpec
from parammap.tensors.shard import views_of
from tests.support.archives import reseal
from tests.support.views import bits_of

NUMPY = {torch.bfloat16: torch.int16}
EMBEDDED = torch.arange(60, dtype=torch.float32).reshape(6, 10)


def raw(tensor):
    """A tensor's row-major bytes."""
    tensor = tensor.detach().contiguous()
    return tensor.view(NUMPY.get(tensor.dtype, tensor.dtype)).numpy().tobytes()


def lying(stored):
    """The row-major bytes that a Stored names."""
    return b"".join(bits_of(view).tobytes() for view, _ in views_of(stored))


def save(path, tree, legacy=True):
    torch.save(tree, path, _use_new_zipfile_serialization=not legacy)
    return path


def tree():
    shared = torch.arange(12, dtype=torch.float16)
    return OrderedDict(
        model={
            "w": torch.randn(3, 5),
            "b": torch.randn(4).bfloat16(),
            "scalar": torch.tensor(3, dtype=torch.int64),
            "empty": torch.zeros(0, 4),
            "shared": shared,
            "part": shared[4:10].view(2, 3),
            "flags": torch.ones(3) > 0,
            "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        },
        args=argparse.Namespace(heads=4, dtype=torch.bfloat16),
        iteration=7,
        text="Größe",
        rates=[0.1, None, (1, 2)],
        shape=torch.Size([2, 3]),
    )


@pytest.mark.parametrize("legacy", [True, False])
def test_every_tensor_lies_where_torch_finds_it(legacy, tmp_path):
    saved = tree()
    found = torch_legacy.read_either(save(tmp_path / "a.pt", saved, legacy))
    assert torch_legacy.is_legacy(tmp_path / "a.pt") == legacy
    for name, tensor in saved["model"].items():
        stored = found["model"][name]
        assert (stored.dtype, stored.shape) == (
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
        ), name
        assert lying(stored) == raw(tensor), name
    assert found["args"].attributes["heads"] == 4 and isinstance(found["args"], Opaque)
    assert (found["iteration"], found["text"], found["rates"], found["shape"]) == (
        7,
        "Größe",
        [0.1, None, (1, 2)],
        (2, 3),
    )
    outer, inner = (found["model"][name].extents[0] for name in ("shared", "part"))
    assert inner.offset == outer.offset + 4 * 2 and inner.nbytes == 12


VIEWS = {  # a view, and whether the file has its columns in one piece
    "columns": (EMBEDDED[:, 3:7], False),
    "rows": (EMBEDDED[2:4], None),
    "transposed": (EMBEDDED.T, True),
    "columns of the transposed": (EMBEDDED.T[:, 1:3], True),
    "rows of the transposed": (EMBEDDED.T[4:9], True),
    "every second row": (EMBEDDED[::2], False),
    "one column": (EMBEDDED[:, 4:5], False),
    "half": (EMBEDDED.bfloat16().T[1:4, 2:], True),
}


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", VIEWS)
def test_a_strided_matrix_keeps_its_strides(name, legacy, tmp_path):
    view, turned = VIEWS[name]
    stored = torch_legacy.read_either(save(tmp_path / "a.pt", {"x": view}, legacy))["x"]
    assert lying(stored) == raw(view) and stored.shape == tuple(view.shape)
    assert (
        stored.strides == (None if turned is None else view.stride()) and len(stored.extents) == 1
    )
    assert turned is None or turned == (stored.strides[1] != 1)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    "view",
    [EMBEDDED[:1].expand(4, 10), EMBEDDED[::2, ::2], EMBEDDED.view(2, 3, 10).permute(2, 0, 1)],
    ids=["repeated", "no line", "three dimensions"],
)
def test_what_is_no_strided_matrix_is_refused(view, legacy, tmp_path):
    with pytest.raises(RefusedError, match="only contiguous tensors can be converted"):
        torch_legacy.read_either(save(tmp_path / "a.pt", {"x": view}, legacy))


def written(frame, tensors):
    """The file that a frame describes."""
    out = io.BytesIO()
    write(
        frame.segments,
        lambda hole: [raw(tensors[hole.tensor])[hole.start : hole.start + hole.nbytes]],
        out,
    )
    return out.getvalue()


def test_torch_loads_what_is_written(tmp_path):
    tensors = [
        torch.randn(3, 5),
        torch.randn(7).half(),
        torch.randn(2, 2).bfloat16(),
        torch.tensor(5),
    ]
    specs = [
        TensorSpec(f"t{n}", str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for n, t in enumerate(tensors)
    ]
    frame = torch_legacy.frame(
        {"model": {spec.name: spec for spec in specs}, "again": specs[1], "iteration": 9}
    )
    assert any(isinstance(segment, Hole) for segment in frame.segments)
    (tmp_path / "a.pt").write_bytes(written(frame, tensors))
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert (
        loaded["iteration"] == 9 and loaded["again"].data_ptr() == loaded["model"]["t1"].data_ptr()
    )
    for spec, tensor in zip(specs, tensors, strict=True):
        there = loaded["model"][spec.name]
        assert (
            there.dtype == tensor.dtype
            and there.shape == tensor.shape
            and torch.equal(there, tensor)
        )


def test_what_is_read_can_be_written_again(tmp_path):
    saved = tree()
    source = torch_legacy.read(save(tmp_path / "a.pt", saved))
    frame = torch_legacy.frame(source)
    tensors = [
        torch.frombuffer(bytearray(lying(one)), dtype=torch.uint8) if one.numel else torch.zeros(0)
        for one in frame.tensors
    ]
    (tmp_path / "b.pt").write_bytes(written(frame, tensors))
    loaded = torch.load(tmp_path / "b.pt", weights_only=False)
    assert vars(loaded["args"]) == vars(saved["args"]) and loaded["shape"] == saved["shape"]
    for name, tensor in saved["model"].items():
        assert torch.equal(loaded["model"][name], tensor.data), name


def test_a_dtype_without_a_storage_class_cannot_be_written():
    with pytest.raises(TypeError, match="uint16 has no storage class"):
        torch_legacy.frame({"x": TensorSpec("x", "uint16", (2,))})


def test_a_file_that_ends_anywhere_is_refused(tmp_path):
    whole = save(tmp_path / "a.pt", tree()).read_bytes()
    assert len(whole) > 1000
    for length in [*range(len(torch_legacy._HEAD), len(whole), 41), len(whole) - 1]:
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(RefusedError, match="truncated|damaged"):
            torch_legacy.read(tmp_path / "cut.pt")


def pieces(*objects):
    return b"".join(pickle.dumps(one, protocol=2) for one in (torch_legacy._MAGIC, 1001, *objects))


LITTLE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}


class Named:
    """Pickled as a storage's persistent id."""

    def __init__(self, *named):
        self.named = named


def with_storage(*named):
    out = io.BytesIO()
    pickler = pickle.Pickler(out, protocol=2)
    pickler.persistent_id = lambda one: one.named if isinstance(one, Named) else None
    pickler.dump({"x": Named(*named)})
    return out.getvalue()


FLOATS = ("storage", torch.FloatStorage, "0", "cpu", 2)
DAMAGED = {
    "big-endian": (pieces({**LITTLE, "little_endian": False}, {}, []), "holds big-endian numbers"),
    "another protocol": (
        pieces(LITTLE, {}, []).replace(b"M\xe9\x03", b"M\xea\x03", 1),
        "is no checkpoint of torch.save",
    ),
    "other keys": (pieces(LITTLE, {}, ["0"]), "its list of storages is not that of its tensors"),
    "a view": (
        pieces(LITTLE) + with_storage(*FLOATS, ("1", 0, 1)) + pickle.dumps(["0"], 2),
        "not that of a whole storage",
    ),
    "five parts": (
        pieces(LITTLE) + with_storage(*FLOATS) + pickle.dumps(["0"], 2),
        "not that of a whole storage",
    ),
    "another length": (
        pieces(LITTLE)
        + with_storage(*FLOATS, None)
        + pickle.dumps(["0"], 2)
        + struct.pack("<q2f", 3, 1, 2),
        "storage '0' has 3 elements and not 2",
    ),
    "a call": (
        pieces(LITTLE) + b"\x80\x02cos\nsystem\nU\x04true\x85R.",
        "names posix.system|names os.system",
    ),
    "a huge string": (
        pieces(LITTLE) + b"\x80\x02\x8d" + struct.pack("<Q", 1 << 40),
        "holds 1099511627776 bytes in one",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused(case, tmp_path):
    content, message = DAMAGED[case]
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(RefusedError, match=message):
        torch_legacy.read(tmp_path / "a.pt")


def test_a_view_beyond_its_storage_is_refused(tmp_path):
    for legacy in (True, False):
        path = save(tmp_path / f"{legacy}.pt", {"x": EMBEDDED[:, 3:7]}, legacy)
        content = path.read_bytes()
        assert content.count(b"K\x03K\x06K\x04\x86") == 1  # the offset and the shape
        path.write_bytes(content.replace(b"K\x03K\x06K\x04\x86", b"K\x09K\x06K\x04\x86"))
        if not legacy:
            reseal(path)
        with pytest.raises(RefusedError, match="reaches beyond its storage"):
            torch_legacy.read_either(path)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(RefusedError, match="cannot be read"):
        torch_legacy.read(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert not torch_legacy.is_legacy(tmp_path / "text.pt") and not torch_legacy.is_legacy(
        tmp_path / "none.pt"
    )
    with pytest.raises(RefusedError, match="no zip archive"):
        torch_legacy.read_either(tmp_path / "text.pt")


def test_contiguous_tensors_are_read_as_torch_zip_reads_them(tmp_path):
    path = save(tmp_path / "a.pt", tree(), legacy=False)
    either, zipped = torch_legacy.read_either(path), torch_zip.read(path)
    assert either["model"] == zipped["model"] and all(
        type(one) is Stored for one in either["model"].values()
    )
