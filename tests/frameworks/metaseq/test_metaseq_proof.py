"""Proving metaseq checkpoints: a consolidated part with 18 wrong values is found, traced to its
shard and mended; copies that parts keep of one tensor and that are not equal are listed. What lies
where is taken from torch.load and the shards' metadata."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from parammap.cli.main import main
from tests.support import opt175b, paths
from tests.support.archives import reseal
from tests.support.logical import flip
from tests.support.metaseq_runs import run_lab
from tests.support.torch_load import torch_load

DATA = paths.TESTS / "data"
FP16 = DATA / "metaseq/mp2dp2_fp16"
MEGATRON = DATA / "megatron/cac60ce4_patched_legacy_tp2pp2"
#: options of tests/support/fsdp.py
SOURCES = {
    "fp16": {"parts": 2, "shards": 2, "dtype": "float16", "hidden": 24},
    "unnested": {"parts": 2, "shards": 3, "nested": False, "hidden": 24},
    "four_parts": {"parts": 4, "shards": 2, "dtype": "float16"},
}
SHARD, KEY = "checkpoint_3-model_part-{}-shard{}.pt", "decoder.layers.1.flat_param_0"
FC1, CANONICAL = "decoder.layers.1.fc1.weight", "layers.1.mlp.fc1.weight"
COUNT = 18


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder for each source; to be read only."""
    folder = tmp_path_factory.mktemp("fsdp")
    run_lab(
        "fsdp", folder, [{"folder": str(folder / name), **given} for name, given in SOURCES.items()]
    )
    return {"golden": FP16, **{name: folder / name for name in SOURCES}}


def convert(source: Path, out: Path, *flags: str) -> Path:
    assert (
        main(["convert", str(source), str(out), "--to", "metaseq", "--workers", "1", *flags]) == 0
    )
    return out


def run(capsys, *arguments: object) -> tuple[int, object]:
    """Exit status and the JSON that a command prints."""
    capsys.readouterr()
    status = main([*map(str, arguments), "--json", "--workers", "1"])
    return status, json.loads(capsys.readouterr().out)


class Flat:
    """Where a named parameter lies in a part's shards, by the shards' own metadata; its values as
    torch loads them."""

    def __init__(self, folder: Path, part: int, name: str) -> None:
        self.files = sorted(folder.glob(f"*-model_part-{part}-shard*.pt"))
        loaded = [torch_load(path) for path in self.files]
        for entry in loaded[0]["shard_metadata"]["param_metadata"]:
            for key, param in entry["params"].items():
                names = [
                    ".".join(filter(None, (entry["fsdp_path"], one))) for one in param["names"]
                ]
                if name in names:
                    number = names.index(name)
                    self.key = ".".join(filter(None, (entry["fsdp_path"], key)))
                    self.start, self.shape = (
                        sum(param["numels"][:number]),
                        tuple(param["shapes"][number]),
                    )
        self.tensors = [content["model"][self.key].numpy() for content in loaded]
        self.chunk = len(self.tensors[0])
        self.offsets = [
            offset_of(tensor, path) for tensor, path in zip(self.tensors, self.files, strict=True)
        ]

    def at(self, index: int) -> tuple[Path, int, int, object]:
        """The file, the element of its flat parameter, its byte and its value, of the parameter's
        `index`-th element."""
        shard, element = divmod(self.start + index, self.chunk)
        tensor = self.tensors[shard]
        return (
            self.files[shard],
            element,
            self.offsets[shard] + element * tensor.itemsize,
            tensor[element],
        )


def offset_of(tensor, path: Path) -> int:
    """The byte at which a tensor begins, found by its content."""
    content, wanted = path.read_bytes(), tensor.tobytes()
    assert content.count(wanted) == 1
    return content.index(wanted)


def spoil(flat: Flat, row: int, col: int, count: int) -> None:
    for file, _, offset, _ in [
        flat.at(row * flat.shape[1] + col + number) for number in range(count)
    ]:
        flip(file, offset, 2)


def row_across_shards(flat: Flat) -> tuple[int, int]:
    """A row and column from which COUNT elements on lie in two shards, if the matrix does; else
    somewhere in the middle."""
    rows, cols = flat.shape
    for edge in range(flat.chunk - flat.start, rows * cols, flat.chunk):
        if edge > 0 and edge % cols > 2:
            return edge // cols, min(edge % cols - 2, cols - COUNT)
    return rows // 2, min(3, cols - COUNT)


@pytest.mark.parametrize("name", ["golden", "fp16", "unnested"])
def test_eighteen_wrong_values_are_found_traced_and_mended(name, sources, tmp_path, capsys):
    """As in a consolidated part 5 of OPT-175B, where they took a checksum per tensor and a search
    by hand."""
    source, out = sources[name], convert(sources[name], tmp_path / "out", "--dp", "1")
    consolidated, shards = Flat(out, 1, FC1), Flat(source, 1, FC1)
    row, col = row_across_shards(shards)
    logical, before = row + shards.shape[0], consolidated.files[0].read_bytes()
    values = [consolidated.at(row * shards.shape[1] + col + number) for number in range(COUNT)]
    spoil(consolidated, row, col, COUNT)
    wrong = Flat(out, 1, FC1).tensors[0]

    status, found = run(capsys, "verify", out)
    names = {one["name"] for one in found["problems"]}
    assert status == 1 and names == {f"{CANONICAL} (weight)", str(consolidated.files[0])}
    status, found = run(capsys, "diff", out, source)
    (difference,) = found["differences"]
    assert status == 1 and (difference["name"], difference["elements"]) == (CANONICAL, COUNT)
    assert len(difference["first"]) == COUNT
    for number, (at, (file, element, offset, value)) in enumerate(
        zip(difference["first"], values, strict=True)
    ):
        theirs, _, there, _ = shards.at(row * shards.shape[1] + col + number)
        assert (at["row"], at["column"], at["a"], at["b"]) == (
            logical,
            col + number,
            wrong[element],
            value,
        )
        assert (at["file_a"], at["offset_a"], at["file_b"], at["offset_b"]) == (
            str(file),
            offset,
            str(theirs),
            there,
        )

    status, found = run(capsys, "verify", out, "--against", source)
    told = next(
        one["what"]
        for one in found["problems"]
        if one["name"] == f"{CANONICAL} (weight)" and "[" in one["what"]
    )
    assert status == 1 and f"{COUNT} of " in told
    runs = expected_runs(shards, row, col)
    stretch = f"[{logical}, {col}:{col + runs[0][2]}]"
    assert stretch in told and told.count(" and ") == len(runs)

    status, found = run(capsys, "locate", source, f"{FC1}[{row},{col}:{col + COUNT}]", "--tp", "1")
    assert status == 0
    assert [
        (one["file"], one["key"], one["element"], one["columns"], one["offset"]) for one in found
    ] == [
        (str(file), f"['model']['{shards.key}']", element, count, offset)
        for file, element, count, offset in runs
    ]
    assert run(capsys, "locate", source, f"{CANONICAL}[{logical},{col}:{col + COUNT}]") == (
        0,
        found,
    )

    spoilt, copy = consolidated.files[0].read_bytes(), tmp_path / "copy"
    status, found = run(capsys, "verify", out, "--against", source, "--repair", "--into", copy)
    assert (status, found["problems"]) == (0, [])
    assert (copy / consolidated.files[0].name).read_bytes() == before
    assert consolidated.files[0].read_bytes() == spoilt
    assert run(capsys, "verify", out, "--against", source, "--repair", "--in-place")[0] == 0
    assert consolidated.files[0].read_bytes() == before


def expected_runs(shards: Flat, row: int, col: int) -> list[tuple[Path, int, int, int]]:
    """File, first element, count and first byte of what lies in each shard."""
    runs: list[tuple[Path, int, int, int]] = []
    for number in range(COUNT):
        file, element, offset, _ = shards.at(row * shards.shape[1] + col + number)
        if runs and runs[-1][0] == file:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1, runs[-1][3])
        else:
            runs.append((file, element, 1, offset))
    return runs


def test_the_row_chosen_lies_in_two_shards(sources):
    """So that what the story proves of shard edges is proved."""
    flats = [Flat(sources[name], 1, FC1) for name in ("golden", "fp16", "unnested")]
    assert any(len(expected_runs(flat, *row_across_shards(flat))) == 2 for flat in flats)


def test_values_saved_wrong_are_mended_checksums_and_all(sources, tmp_path, capsys):
    """A consolidation that computed wrong values saved them with checksums that fit."""
    out = convert(sources["fp16"], tmp_path / "out", "--dp", "1")
    (out / "parammap_manifest.json").unlink()
    path = out / SHARD.format(1, 0)
    flat, content = Flat(out, 1, FC1), torch_load(path)
    torch.save(content, path)
    right = records(path)
    content["model"][KEY][flat.start + 40 : flat.start + 40 + COUNT] = 7
    torch.save(content, path)
    assert zipfile.ZipFile(path).testzip() is None
    copy = tmp_path / "copy"
    assert (
        run(capsys, "verify", out, "--against", sources["fp16"], "--repair", "--into", copy)[0] == 0
    )
    assert zipfile.ZipFile(copy / path.name).testzip() is None
    assert records(copy / path.name) == right


def records(path: Path) -> dict[str, bytes]:
    """An archive's records, but for torch's hash of them all, by which nothing is checked."""
    with zipfile.ZipFile(path) as archive:
        return {
            name: archive.read(name)
            for name in archive.namelist()
            if not name.endswith("serialization_id")
        }


def test_damage_beside_the_values_is_not_blessed(sources, tmp_path, capsys):
    """Where a byte of padding in the same record is wrong as well, its checksum tells, and no copy
    appears."""
    source, out = sources["fp16"], convert(sources["fp16"], tmp_path / "out", "--dp", "5")
    (out / "parammap_manifest.json").unlink()
    norm = Flat(out, 1, "decoder.layers.1.final_layer_norm.bias")
    file, element, offset, _ = norm.at(23)
    assert (file, norm.chunk - element > 1) == (norm.files[4], True), (
        "the last parameter's last element, before padding"
    )
    flip(file, offset, 2)
    flip(file, offset + 2, 2)
    status, found = run(
        capsys, "verify", out, "--against", source, "--repair", "--into", tmp_path / "copy"
    )
    assert status == 1 and ["record" in one["what"] for one in found["problems"]] == [True]
    assert not (tmp_path / "copy").exists()


def test_one_consolidated_part_is_mended_from_its_own_shards(sources, tmp_path, capsys):
    out = convert(sources["fp16"], tmp_path / "out", "--dp", "1")
    path, shards = out / SHARD.format(1, 0), sources["fp16"] / "checkpoint_3-model_part-1-shard*.pt"
    before = path.read_bytes()
    spoil(Flat(out, 1, FC1), 2, 3, COUNT)
    status, found = run(capsys, "verify", path, "--against", shards)
    values, record = [one["what"] for one in found["problems"]]
    assert status == 1 and f"[2, 3:{3 + COUNT}]" in values and "checksum" in record
    assert (
        run(
            capsys,
            "verify",
            path,
            "--against",
            shards,
            "--repair",
            "--into",
            tmp_path / "mended.pt",
        )[0]
        == 0
    )
    assert (tmp_path / "mended.pt").read_bytes() == before


def test_a_pattern_names_nothing_to_copy(sources, tmp_path, capsys):
    out = convert(sources["fp16"], tmp_path / "out", "--dp", "1")
    spoil(Flat(out, 1, FC1), 2, 3, COUNT)
    before = sorted(tmp_path.iterdir())
    assert (
        main(
            [
                "verify",
                f"{out}/checkpoint_3",
                "--against",
                str(sources["fp16"]),
                "--repair",
                "--into",
                str(tmp_path / "copy"),
            ]
        )
        == 2
    )
    assert "--in-place" in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before


def test_of_many_wrong_values_the_first_are_listed(sources, tmp_path, capsys):
    source, out = sources["fp16"], convert(sources["fp16"], tmp_path / "out", "--dp", "1")
    spoil(Flat(out, 0, FC1), 0, 5, 33)
    (difference,) = run(capsys, "diff", out, source)[1]["differences"]
    assert difference["elements"] == 33
    assert [(at["row"], at["column"]) for at in difference["first"]] == [
        (0, 5),
        (0, 6),
        (0, 7),
        (0, 8),
    ]
    spoil(Flat(out, 0, FC1), 0, 5, 1)
    (difference,) = run(capsys, "diff", out, source)[1]["differences"]
    assert [(at["row"], at["column"]) for at in difference["first"]] == [
        divmod(n, 24) for n in range(6, 38)
    ]
    told = [one["what"] for one in run(capsys, "verify", out, "--against", source)[1]["problems"]]
    assert any("[0, 6:24]" in one and "[1, 0:14]" in one for one in told)


# -------------------------------------------------------------------------------------------------------------
# replicas

NORM, NORM_CANONICAL = (
    "decoder.layers.0.final_layer_norm.weight",
    "layers.0.post_attention_norm.weight",
)


def kept_by_all(path: Path) -> int:
    """How many tensors each part keeps whole: not those of rows or columns, and no buffers without
    optimizer states."""
    names = [
        name
        for entry in torch_load(path)["shard_metadata"]["param_metadata"]
        for param in entry["params"].values()
        for name in param["names"]
    ]
    return sum(
        not name.endswith(
            (
                "fc1.weight",
                "fc1.bias",
                "fc2.weight",
                "qkv_proj.weight",
                "qkv_proj.bias",
                "out_proj.weight",
                "embed_tokens.weight",
                "output_projection.weight",
            )
        )
        for name in names
    )


@pytest.mark.parametrize("name", ["golden", "fp16", "unnested", "four_parts"])
def test_equal_replicas_are_no_problem(name, sources, capsys):
    status, found = run(capsys, "verify", sources[name], "--replicas")
    kept = kept_by_all(sources[name] / SHARD.format(0, 0))
    assert (status, found["problems"], found["replicas"]) == (0, [], [])
    assert found["tensors_compared"] == 3 * kept + 1, "weights, both moments, and decoder.version"


@pytest.mark.parametrize(
    ("name", "part"), [("golden", 1), ("fp16", 1), ("unnested", 1), ("four_parts", 2)]
)
def test_replicas_that_differ_are_listed(name, part, sources, tmp_path, capsys):
    folder = Path(shutil.copytree(sources[name], tmp_path / "shards"))
    first, other = Flat(folder, 0, NORM), Flat(folder, part, NORM)
    for index in (2, 3, 9):
        flip(other.at(index)[0], other.at(index)[2], 1)
    for file in {other.at(index)[0] for index in (2, 3, 9)}:
        reseal(Path(file))
    wrong = Flat(folder, part, NORM)
    status, found = run(capsys, "verify", folder, "--replicas")
    (one,) = found["replicas"]
    assert status == 1 and (one["name"], one["role"], one["elements"]) == (
        NORM_CANONICAL,
        "weight",
        3,
    )
    expected = []
    for index in (2, 3, 9):
        (file_a, _, offset_a, a), (file_b, _, _, b) = first.at(index), wrong.at(index)
        expected.append(
            {
                "row": index,
                "column": 0,
                "a": a,
                "b": b,
                "file_a": str(file_a),
                "offset_a": offset_a,
                "file_b": str(file_b),
                "offset_b": other.at(index)[2],
            }
        )
    assert one["first"] == expected
    (problem,) = found["problems"]
    assert (
        problem["name"] == f"{NORM_CANONICAL} (weight)"
        and "3 of " in problem["what"]
        and "[2:4, 0]" in problem["what"]
    )
    assert main(["verify", str(folder), "--workers", "2"]) == 0, "nobody asked for replicas"
    assert main(["verify", str(folder), "--replicas", "--workers", "2"]) == 1
    assert "[2:4, 0]" in capsys.readouterr().out


def test_replicas_of_an_output_are_mended_from_the_shards(sources, tmp_path, capsys):
    source, out = sources["fp16"], convert(sources["fp16"], tmp_path / "out", "--dp", "1")
    (out / "parammap_manifest.json").unlink()
    norm = Flat(out, 1, NORM)
    before = norm.files[0].read_bytes()
    flip(norm.files[0], norm.at(4)[2], 1)
    status, found = run(capsys, "verify", out, "--replicas")
    assert status == 1 and [at["row"] for at in found["replicas"][0]["first"]] == [4]
    status, found = run(
        capsys, "verify", out, "--replicas", "--against", source, "--repair", "--in-place"
    )
    assert (status, found["problems"], found["replicas"]) == (0, [], [])
    assert norm.files[0].read_bytes() == before


def test_replicas_of_any_framework_are_compared(tmp_path, capsys):
    """Megatron-LM's word embedding is kept by the first and the last stage; its norms by every
    tensor-parallel rank."""
    folder = Path(shutil.copytree(MEGATRON, tmp_path / "megatron"))
    assert run(capsys, "verify", folder, "--replicas")[0] == 0
    path = next(folder.rglob("mp_rank_01_000/model_optim_rng.pt"))
    norm = torch_load(path)["model"]["language_model"]["encoder"]["layers.0.input_norm.weight"]
    offset = offset_of(norm.view(torch.int16).numpy(), path) + 2
    flip(path, offset, 3)
    status, found = run(capsys, "verify", folder, "--replicas")
    (one,) = found["replicas"]
    assert status == 1 and (one["name"], one["role"]) == (
        "layers.0.input_norm.weight",
        "model_weight",
    )
    assert [(at["row"], at["file_b"], at["offset_b"]) for at in one["first"]] == [
        (1, str(path), offset)
    ]


def test_one_part_has_no_replicas(sources, tmp_path, capsys):
    out = convert(sources["fp16"], tmp_path / "out", "--tp", "1", "--dp", "1")
    (out / "parammap_manifest.json").unlink()
    status, found = run(capsys, "verify", out, "--replicas")
    assert (
        status == 0 and found["tensors_compared"] == 0 and "no replicas" in " ".join(found["notes"])
    )


# ----------------------------------------------------------------------------------------- between
# the tools' own files


@pytest.mark.parametrize("name", ["rf1", "rf_n3", "rm1", "rm4", "stitched.pt"])
def test_shards_resharded_files_and_singletons_are_compared(name, capsys):
    """Those that metaseq's own tools made: shards of another number, parts joined and cut, one file
    of whole tensors."""
    status, found = run(capsys, "diff", FP16, FP16 / "up" / name, "--weights-only")
    assert (status, found["differences"]) == (0, []) and found["tensors_compared"] == 53


def test_wrong_values_of_a_singleton_are_traced_to_the_shards(tmp_path, capsys):
    path, shards = (
        Path(shutil.copy(FP16 / "up/stitched.pt", tmp_path / "restored.pt")),
        Flat(FP16, 1, FC1),
    )
    whole = torch_load(path)["model"][FC1].numpy()
    start, row = offset_of(whole, path), shards.shape[0] + 3
    for col in range(2, 2 + COUNT):
        flip(path, start + 2 * (row * whole.shape[1] + col), 6)
    status, found = run(capsys, "diff", FP16, path, "--weights-only")
    (difference,) = found["differences"]
    assert status == 1 and [(at["row"], at["column"]) for at in difference["first"]] == [
        (row, col) for col in range(2, 2 + COUNT)
    ]
    for at in difference["first"]:
        file, _, offset, value = shards.at(3 * shards.shape[1] + at["column"])
        assert (at["file_a"], at["offset_a"], at["a"]) == (str(file), offset, value)


def test_a_position_of_opt_175b_is_located(tmp_path, capsys):
    """The real metadata and sizes of part 5, 124 shards of 353 MB without content."""
    opt175b.write(tmp_path, [5])
    status, (found,) = run(
        capsys,
        "locate",
        tmp_path / "checkpoint_last-model_part-5-shard*.pt",
        "decoder.layers.15.fc1.weight[1537,5172:5190]",
    )
    assert status == 0 and (
        Path(found["file"]).name,
        found["key"],
        found["element"],
        found["columns"],
    ) == (
        "checkpoint_last-model_part-5-shard51.pt",
        "['model']['decoder.layers.15.flat_param_0']",
        1241838,
        18,
    )
