"""Reading checkpoints of torch.save, with torch.save and torch.load as the oracle."""

import collections
import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parammap.errors import RefusedError
from parammap.formats import torch_zip, zip_records
from parammap.formats.pickles import Global, Opaque
from parammap.tensors.logical import ITEMSIZE, Extent, Stored
from tests.support import paths

GOLDENS = sorted((paths.TESTS / "data" / "megatron").glob("*/iter_*/mp_rank_*/*.pt"))
IDS = ["/".join(path.parts[-4:]) for path in GOLDENS]


def _bytes_of(stored: Stored) -> bytes:
    (extent,) = stored.extents
    with open(extent.file, "rb") as stream:
        stream.seek(extent.offset)
        return stream.read(extent.nbytes)


def _same(stored, tensor: torch.Tensor) -> bool:
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return (
        isinstance(stored, Stored)
        and (stored.dtype, stored.shape) == (str(tensor.dtype)[6:], tuple(tensor.shape))
        and _bytes_of(stored) == content
    )


def _saved(tmp_path, value) -> str:
    path = str(tmp_path / "saved.pt")
    torch.save(value, path)
    return path


def _refused(path) -> str:
    with pytest.raises(RefusedError) as caught:
        torch_zip.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_every_dtype(tmp_path, dtype):
    tensor = torch.randint(0, 2, (3, 5)).to(getattr(torch, dtype))
    assert _same(torch_zip.read(_saved(tmp_path, tensor)), tensor)


BASE = torch.arange(60, dtype=torch.float32)
_with_attribute = torch.ones(3)
_with_attribute.tensor_model_parallel = True
_parameter_with_attribute = torch.nn.Parameter(torch.ones(3))
_parameter_with_attribute.partition_dim = 0
TENSORS = {
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0),
    "empty of two dimensions": torch.zeros(3, 0, 2),
    "view at an offset": BASE[7:19].view(3, 4),
    "expanded over a dimension of size 1": torch.zeros(4).as_strided((1, 4), (99, 1)),
    "column of one row": BASE.view(12, 5)[3:4, :],
    "parameter": torch.nn.Parameter(torch.randn(2, 3)),
    "parameter in bfloat16": torch.nn.Parameter(torch.randn(2, 3).bfloat16()),
    "with an attribute": _with_attribute,
    "parameter with an attribute": _parameter_with_attribute,
    "requires grad": torch.ones(2, requires_grad=True),
}


@pytest.mark.parametrize("case", TENSORS)
def test_every_kind_of_dense_tensor(tmp_path, case):
    assert _same(torch_zip.read(_saved(tmp_path, [TENSORS[case]]))[0], TENSORS[case])


def test_tensors_that_share_a_storage(tmp_path):
    tree = {"all": BASE, "head": BASE[:20], "tail": BASE[20:].view(4, 10), "again": BASE}
    read = torch_zip.read(_saved(tmp_path, tree))
    assert all(_same(read[name], tensor) for name, tensor in tree.items())
    assert (
        read["all"] == read["again"]
        and read["tail"].extents[0].offset == read["all"].extents[0].offset + 80
    )


def test_a_module_with_its_metadata_and_extra_state(tmp_path):
    state = torch.nn.Linear(3, 4).state_dict()
    state["_extra_state"] = io.BytesIO(b"abc")
    read = torch_zip.read(_saved(tmp_path, {"model": state, "none": None}))["model"]
    assert isinstance(read, collections.OrderedDict) and list(read) == [
        "weight",
        "bias",
        "_extra_state",
    ]
    assert read._metadata[""] == {"version": 1}
    assert isinstance(read["_extra_state"], Opaque) and read["_extra_state"].state[0] == b"abc"
    assert _same(read["weight"], state["weight"])


def test_a_bare_storage(tmp_path):
    read = torch_zip.read(_saved(tmp_path, BASE.untyped_storage()))
    assert isinstance(read, torch_zip.Storage) and read.extent.nbytes == 240


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("path", GOLDENS, ids=IDS)
def test_real_checkpoints_of_megatron(path):
    with zipfile.ZipFile(path) as archive:
        storages = {
            name.rsplit("/", 1)[1]: archive.read(name)
            for name in archive.namelist()
            if "/data/" in name
        }
        named = _tensors_of_torch(archive)
    found = _tensors_in(torch_zip.read(path))
    assert len(found) == len(named) > 0
    for stored, (dtype, key, offset, shape) in zip(found, named, strict=True):
        size = ITEMSIZE[dtype]
        assert (stored.dtype, stored.shape) == (dtype, shape)
        assert (
            _bytes_of(stored)
            == storages[key][offset * size : (offset + torch.Size(shape).numel()) * size]
        )


def _tensors_of_torch(archive: zipfile.ZipFile) -> list[tuple]:
    """(dtype, storage key, offset, shape) of each tensor in the order of pickling, told by the C
    unpickler."""
    found = []

    class Anything:
        def __new__(cls, *args):
            return super().__new__(cls)

        def __setstate__(self, state):
            pass

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if name == "_rebuild_tensor_v2":
                return lambda storage, offset, shape, *_: found.append((*storage, offset, shape))
            return (
                getattr(torch, name)
                if name.endswith("Storage")
                else {
                    "OrderedDict": collections.OrderedDict,
                    "encode": lambda text, _: text.encode("latin1"),
                }.get(name, Anything)
            )

        def persistent_load(self, pid):
            return str(pid[1].dtype)[6:], pid[2]

    (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
    Unpickler(io.BytesIO(archive.read(name))).load()
    return found


def _tensors_in(tree) -> list[Stored]:
    if isinstance(tree, Stored):
        return [tree]
    parts = (
        tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    )
    return [stored for part in parts for stored in _tensors_in(part)]


def test_keys_of_the_optimizer_are_dtypes(tmp_path):
    read = torch_zip.read(_saved(tmp_path, {0: {(torch.bfloat16, torch.float32): {"param": BASE}}}))
    assert list(read[0]) == [(Global("torch", "bfloat16"), Global("torch", "float32"))]


def test_tensor_data_is_never_read(tmp_path):
    path = _saved(tmp_path, {str(number): torch.ones(1 << 20) for number in range(10)})
    before = _bytes_read()
    torch_zip.read(path)
    assert _bytes_read() - before < 200_000


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


FOREIGN = {
    "transposed": lambda: torch.zeros(3, 4).t(),
    "strided": lambda: torch.zeros(3, 4)[:, :2],
    "expanded": lambda: torch.zeros(1, 4).expand(3, 4),
    "complex": lambda: torch.zeros(2, dtype=torch.complex64),
    "float8": lambda: torch.zeros(2, dtype=torch.float8_e4m3fn),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "sparse rows": lambda: torch.eye(2).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "without data": lambda: torch.zeros(2, device="meta"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_dense_box_are_refused(tmp_path, case):
    _refused(_saved(tmp_path, [FOREIGN[case]()]))


def test_a_missing_file_is_refused(tmp_path):
    assert "cannot be read" in _refused(str(tmp_path / "missing.pt"))
    assert "is a folder" in _refused(str(tmp_path))


def test_the_format_before_torch_1_6_is_refused(tmp_path):
    path = str(tmp_path / "old.pt")
    torch.save({"a": BASE}, path, _use_new_zipfile_serialization=False)
    assert "before 1.6" in _refused(path)


def test_a_tar_is_refused(tmp_path):
    path = str(tmp_path / "old.tar")
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "storages")
    assert "before 1.6" in _refused(path)


@pytest.mark.parametrize(
    "content, reason",
    [(b"", "is empty"), (b"hello" * 100, "not a checkpoint"), (b"\0" * 100, "not a checkpoint")],
)
def test_other_files_are_refused(tmp_path, content, reason):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    assert reason in _refused(str(path))


def test_torchscript_is_refused(tmp_path):
    path = str(tmp_path / "script.pt")
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version"):
            archive.writestr(f"m/{name}", b"")
    assert "not a checkpoint of torch.save" in _refused(path)


def _rewritten(tmp_path, changes: dict, compression=zipfile.ZIP_STORED) -> str:
    source, target = _saved(tmp_path, {"w": BASE}), str(tmp_path / "rewritten.pt")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = changes.get(name.split("/", 1)[1], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def test_an_archive_packed_again_without_compression_is_read(tmp_path):
    assert _same(torch_zip.read(_rewritten(tmp_path, {}))["w"], BASE)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"data/0": b"short"}, "has 5 bytes for 60 elements"),
        ({"data/0": None}, "lacks the storage"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"data.pkl": None}, "not a checkpoint of torch.save"),
        ({"data.pkl": b"cos\nsystem\n."}, "names os.system"),
    ],
)
def test_damaged_archives_are_refused(tmp_path, changes, reason):
    assert reason in _refused(_rewritten(tmp_path, changes))


def test_a_compressed_archive_is_refused(tmp_path):
    assert "packed" in _refused(_rewritten(tmp_path, {}, zipfile.ZIP_DEFLATED))


def test_a_record_that_ends_beyond_the_file_is_refused(tmp_path):
    path = Path(_saved(tmp_path, {"w": BASE}))
    content = path.read_bytes()
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"saved/data/0"))
    path.write_bytes(
        content[: entry + 20] + struct.pack("<2I", 10**6, 10**6) + content[entry + 28 :]
    )
    assert "ends beyond the file" in _refused(str(path))


def test_a_record_that_occurs_twice_is_refused(tmp_path):
    path = _saved(tmp_path, {"w": BASE})
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("saved/data.pkl", b"N.")
    assert "twice" in _refused(path)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    path = folder / "honest.pt"
    torch.save({"w": BASE, "n": [1, 2, "x"], "s": torch.nn.Linear(2, 2).state_dict()}, path)
    return path.read_bytes(), str(folder / "damaged.pt")


@given(st.integers(0, 10**6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_is_refused(honest, cut):
    content, path = honest
    Path(path).write_bytes(content[: cut % len(content)])
    _refused(path)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_within_its_bounds_or_refused(honest, flips):
    content, path = bytearray(honest[0]), honest[1]
    for position, byte in flips:
        content[position % len(content)] = byte
    Path(path).write_bytes(content)
    try:
        found = _tensors_in(torch_zip.read(path))
    except RefusedError:
        return
    for stored in found:
        (extent,) = stored.extents
        assert extent.file == path and 0 <= extent.offset <= extent.offset + extent.nbytes <= len(
            content
        )


@pytest.mark.parametrize("offset", [2**63, 2**64 - 1, 10**9, -1])
def test_a_record_said_to_lie_outside_is_refused(honest, offset):
    content, path = honest
    Path(path).write_bytes(content)
    info = zipfile.ZipInfo("honest/data.pkl")
    info.header_offset = offset
    with (
        open(path, "rb") as stream,
        pytest.raises(RefusedError, match="not where the directory says"),
    ):
        zip_records._extent(
            zip_records._Window(stream.fileno(), Extent(path, 0, len(content))), info
        )


_EXTENT_FORGED = b"""\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n\
X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK<tQK\x00K\x05\x85K\x01\x85\x89NtR](X\x07\x00\x00\x00float32K\x05\x85\
((X\x0b\x00\x00\x00/etc/passwdK\x00K\x14tteb."""


def test_a_pickle_cannot_forge_where_a_tensor_lies(tmp_path):
    """A frozen dataclass with slots has a __setstate__, through which open unpickling lets BUILD
    set its fields."""
    assert "sets the state of a Stored" in _refused(
        _rewritten(tmp_path, {"data.pkl": _EXTENT_FORGED})
    )


@pytest.mark.parametrize(
    "box", ["-1 5 1", "56 5 1", "0 61 1", "0 -5 1", "4611686018427387904 5 1", "0 5 -1", "0 5 0"]
)
def test_a_pickle_cannot_reach_beyond_its_storage(tmp_path, box):
    offset, size, stride = (b"L%sL\n" % number.encode() for number in box.split())
    pickled = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI60\ntQ"
        + offset
        + b"("
        + size
        + b"t("
        + stride
        + b"tI00\nNtR."
    )
    _refused(_rewritten(tmp_path, {"data.pkl": pickled}))


def test_a_pickle_written_by_hand_reaches_all_of_its_storage(tmp_path):
    pickled = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI60\ntQ"
        b"I10\n(I50\nt(I1\ntI00\nNtR."
    )
    assert _same(torch_zip.read(_rewritten(tmp_path, {"data.pkl": pickled})), BASE[10:])
