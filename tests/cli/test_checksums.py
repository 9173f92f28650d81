"""Every byte that is read or was written is held to a checksum, where there is one: one flipped bit,
two exchanged files, a file that changes meanwhile end in one line and no output."""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.serialization import set_crc32_options

from parammap.checkpoint.manifest import MANIFEST
from parammap.cli.main import main
from parammap.errors import TaskError
from parammap.job import conversion
from parammap.job.staging import Staging
from tests.support import deepspeed_goldens, paths
from tests.support.archives import content_of
from tests.support.logical import flip

DATA = paths.TESTS / "data"
GOLDEN = DATA / "megatron/cac60ce4_patched_legacy_tp2pp2"
METASEQ = DATA / "metaseq/mp1dp3_fp32"
OPTIMIZER = "iter_0000002/mp_rank_01_000/distrib_optim.pt"
ONE_RANK = ("--to", "mindspore", "--tp", "1", "--pp", "1")


def run(source: Path, out: Path, *flags: str) -> int:
    return main(["convert", str(source), str(out), *(flags or ONE_RANK)])


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def refused(capsys, status: int, *said: str) -> None:
    """That the command before ended so, in one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("parammap:")]
    assert status in (2, 3) and len(lines) == 1, (status, lines)
    assert all(word in lines[0] for word in said), lines


@pytest.fixture
def source(tmp_path) -> Path:
    return shutil.copytree(GOLDEN, tmp_path / "source")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """Outputs of the goldens, by target."""
    folder = tmp_path_factory.mktemp("made")
    sources = {
        "mindspore": (GOLDEN,),
        "safetensors": (GOLDEN, "--format", "safetensors"),
        "megatron": (GOLDEN, "--tp", "1"),
        "megatron-dist": (GOLDEN,),
        "deepspeed": (GOLDEN,),
        "transformers": (METASEQ,),
        "metaseq": (METASEQ, "--tp", "2"),
    }
    for name, (origin, *flags) in sources.items():
        to = "mindspore" if name == "safetensors" else name
        assert run(origin, folder / name, "--to", to, *flags) == 0
    return {name: folder / name for name in sources}


# ------------------------------------------------------------------------------------------------
# a source's own checksums


def records(path: Path) -> list[tuple[zipfile.ZipInfo, int, int]]:
    with zipfile.ZipFile(path) as archive:
        return [(info, *content_of(path, info)) for info in archive.infolist()]


def places(path: Path) -> dict[str, tuple[int, int]]:
    """A byte and a bit of each class of an archive's bytes that say what is read."""
    (pickled,) = (one for one in records(path) if one[0].filename.endswith("data.pkl"))
    info, start, end = max(records(path), key=lambda one: one[0].file_size)
    with zipfile.ZipFile(path) as archive:
        entry = archive.start_dir
    return {
        "a tensor's begin": (start, 0),
        "a tensor's middle": ((start + end) // 2, 6),
        "a tensor's end": (end - 1, 7),
        "the pickle": (pickled[2] - 40, 0),
        "the name in a local header": (info.header_offset + 31, 1),
        "the length of a name": (info.header_offset + 26, 0),
        "the length of the extra field": (info.header_offset + 28, 2),
        "the padding's own length": (info.header_offset + 30 + len(info.filename) + 2, 0),
        "the directory's CRC-32": (entry + 16, 3),
        "the directory's size": (entry + 24, 0),
        "the directory's name": (entry + 46, 0),
        "the directory's offset": (entry + 42, 5),
    }


@pytest.mark.parametrize("place", places(GOLDEN / OPTIMIZER))
def test_a_flipped_bit_of_a_source_is_refused(source, tmp_path, capsys, place):
    file = source / OPTIMIZER
    flip(file, *places(file)[place])
    refused(capsys, run(source, tmp_path / "out"), str(file))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_record_is_named(source, tmp_path, capsys):
    file = source / OPTIMIZER
    info, start, _ = max(records(file), key=lambda one: one[0].file_size)
    flip(file, start + 5, 0)
    refused(capsys, run(source, tmp_path / "out"), f"record {info.filename} ", "checksum")


@pytest.mark.parametrize(
    "flags",
    [
        ONE_RANK,
        ("--to", "mindspore"),
        ("--to", "mindspore", "--tp", "2", "--pp", "1", "--workers", "2"),
        ("--to", "megatron", "--tp", "1"),
        ("--to", "megatron-dist"),
        ("--to", "deepspeed"),
    ],
)
def test_a_record_that_several_tasks_read_in_pieces_is_checked_once(
    tmp_path, capsys, flags, monkeypatch
):
    """However the layouts differ: a good source is never refused, and all of its records of tensors
    are checked."""
    assert run(GOLDEN, tmp_path / "out", *flags) == 0
    (line,) = (one for one in capsys.readouterr().out.splitlines() if "fit the checksums" in one)
    large = sum(
        info.file_size > 0
        for file in (GOLDEN / "iter_0000002").rglob("distrib_optim.pt")
        for info, *_ in records(file)
    )
    assert int(line.split()[0]) >= large


@pytest.mark.parametrize("bit", range(0, 8, 3))
def test_a_count_of_steps_that_is_read_with_the_headers_is_checked(tmp_path, capsys, bit):
    """The same bit in all files, so that they agree."""
    source = deepspeed_goldens.unpack(deepspeed_goldens.GPT, tmp_path / "source")
    files = [path for path in source.rglob("*.pt") if path.is_file()]
    small = [
        (path, start)
        for path in files
        for info, start, _ in records(path)
        if "/data/" in info.filename and 0 < info.file_size <= 8
    ]
    for path, start in small:
        flip(path, start + 2, bit)
    status = run(source, tmp_path / "out", "--to", "megatron", "--replicas", "first")
    refused(capsys, status, "does not fit the record's checksum")


def test_a_file_that_torch_saved_without_checksums_is_read(source, tmp_path, capsys):
    assert run(source, tmp_path / "out") == 0
    set_crc32_options(False)
    try:
        for file in source.rglob("distrib_optim.pt"):
            torch.save(torch.load(file, weights_only=True), file)
    finally:
        set_crc32_options(True)
    assert any(info.CRC == 0 < info.file_size for info, *_ in records(source / OPTIMIZER))
    assert run(source, tmp_path / "again") == 0
    names = [name for name in contents(tmp_path / "out") if name.endswith(".ckpt")]
    assert names and all(
        contents(tmp_path / "out")[name] == contents(tmp_path / "again")[name] for name in names
    )


def test_a_source_that_changes_meanwhile_is_refused(source, tmp_path, capsys, monkeypatch):
    """Of a tensor file and of a sidecar, in any way that leaves the size and the content alone."""
    execute = conversion._execute
    for file in (source / OPTIMIZER, next((source / "param_map").iterdir())):

        def touched(*arguments, file=file):
            outcomes = execute(*arguments)
            os.utime(file)
            return outcomes

        monkeypatch.setattr(conversion, "_execute", touched)
        status = run(source, tmp_path / "out", *ONE_RANK, "--sidecar", str(source / "param_map"))
        refused(capsys, status, str(file), "was changed while it was read")
        assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------
# our own outputs as sources


ON = {
    "mindspore": ("--to", "megatron"),
    "safetensors": ("--to", "megatron"),
    "megatron": ("--to", "mindspore"),
    "megatron-dist": ("--to", "mindspore"),
    "deepspeed": ("--to", "megatron"),
    "transformers": ("--to", "alpa"),
    "metaseq": ("--to", "alpa"),
}


@pytest.mark.parametrize("name", ON)
def test_an_own_output_converts_on_and_that_it_is_whole_is_said(made, tmp_path, capsys, name):
    capsys.readouterr()
    assert run(made[name], tmp_path / "out", *ON[name]) == 0
    assert f"are as its {MANIFEST} says" in capsys.readouterr().out


@pytest.mark.parametrize("name", ON)
def test_no_flipped_bit_of_an_own_output_converts_on(made, tmp_path, capsys, name):
    """Anywhere in any file: it is refused, or what is made of it is the same to the last byte."""
    rng, source = random.Random(name), shutil.copytree(made[name], tmp_path / "source")
    assert run(source, tmp_path / "right", *ON[name]) == 0
    right, found = contents(tmp_path / "right"), 0
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in rng.choices(files, k=6):
        at = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, *at)
        capsys.readouterr()
        status = run(source, tmp_path / "out", *ON[name])
        if status in (2, 3):
            refused(capsys, status)
            found += 1
        else:
            assert contents(tmp_path / "out") == right, (path, at)
        flip(path, *at)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert found


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("mindspore", ("rank_0/network.ckpt", "rank_1/network.ckpt")),
        ("mindspore", ("rank_0/network.ckpt", "rank_2/network.ckpt")),
        ("mindspore", ("pt_meta/args_tp00_pp000.pt", "pt_meta/args_tp01_pp000.pt")),
        ("safetensors", ("rank_2/network.safetensors", "rank_3/network.safetensors")),
    ],
)
def test_two_exchanged_files_of_an_own_output_are_refused(made, tmp_path, capsys, name, pair):
    source = shutil.copytree(made[name], tmp_path / "source")
    first, second = (source / one for one in pair)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    refused(capsys, run(source, tmp_path / "out", *ON[name]))


def test_an_own_output_that_was_trained_on_is_not_held_to_its_manifest(made, tmp_path, capsys):
    """Saved again under the same names, by another program, every tensor a little different."""
    source = shutil.copytree(made["safetensors"], tmp_path / "source")
    for file in source.rglob("*.safetensors"):
        tensors = load_file(file)
        stepped = {name: one * 1.01 + 1e-3 if one.ndim else one for name, one in tensors.items()}
        save_file(
            {name: one.astype(tensors[name].dtype) for name, one in stepped.items()},
            file,
            {"format": "ms"},
        )
    capsys.readouterr()
    assert run(source, tmp_path / "out", *ON["safetensors"]) == 0
    assert "was written again since ParamMap made it" in capsys.readouterr().out


def test_one_file_saved_again_is_no_training(made, tmp_path, capsys):
    source = shutil.copytree(made["transformers"], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config))
    refused(
        capsys, run(source, tmp_path / "out", "--to", "alpa"), "config.json", f"remove {MANIFEST}"
    )
    (source / MANIFEST).unlink()
    assert run(source, tmp_path / "out", "--to", "alpa") == 0


# ------------------------------------------------------------------------------------------------
# verify


@pytest.mark.parametrize("name", ON)
def test_verify_finds_a_flipped_bit_in_every_kind_of_file(made, tmp_path, capsys, name):
    """One at the begin, one at the end and one anywhere: headers, directories, sidecars, trackers."""
    rng, out = random.Random(name), shutil.copytree(made[name], tmp_path / "out")
    assert main(["verify", str(out)]) == 0
    kinds = {(path.suffix, path.parent == out): path for path in files_of(out, rng)}
    for path in kinds.values():
        for byte in {0, path.stat().st_size - 1, rng.randrange(path.stat().st_size)}:
            if path.name == MANIFEST and byte >= path.stat().st_size - 1:
                continue  # the line's end, which is no part of the document
            flip(path, byte, rng.randrange(7))
            assert main(["verify", str(out)]) in (1, 2), (path, byte)
            flip_back(path, out, made[name])
            said = capsys.readouterr()
            assert "Traceback" not in said.err
    assert main(["verify", str(out)]) == 0


def files_of(folder: Path, rng: random.Random) -> list[Path]:
    """All files, in any order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return rng.sample(files, len(files))


def flip_back(path: Path, out: Path, origin: Path) -> None:
    path.write_bytes((origin / path.relative_to(out)).read_bytes())


@pytest.mark.parametrize("field", ["status", "source", "digests", "files", "iteration"])
def test_a_manifest_that_was_changed_is_refused(made, tmp_path, capsys, field):
    out = shutil.copytree(made["mindspore"], tmp_path / "out")
    content = json.loads((out / MANIFEST).read_text())
    before = content[field]
    content[field] = before[1:] if isinstance(before, (list, str)) else before + 1
    (out / MANIFEST).write_text(json.dumps(content))
    refused(capsys, main(["verify", str(out)]), MANIFEST, "is damaged")


def test_a_manifest_of_version_2_proves_as_it_did(made, tmp_path, capsys):
    out = shutil.copytree(made["mindspore"], tmp_path / "out")
    content = json.loads((out / MANIFEST).read_text())
    for file in content["files"]:
        del file["crc32"]
    del content["sha256"]
    (out / MANIFEST).write_text(json.dumps(content | {"version": 2}))
    assert main(["verify", str(out)]) == 0
    flip(out / "rank_0/network.ckpt", (out / "rank_0/network.ckpt").stat().st_size // 2, 5)
    assert main(["verify", str(out)]) == 1


def test_verify_reads_a_whole_source_and_says_what_covers_it(source, capsys):
    assert main(["verify", str(source)]) == 0
    held = sum(info.file_size for file in source.rglob("*.pt") for info, *_ in records(file))
    assert f"fit a checksum: {held} the zip records' own" in capsys.readouterr().out
    info, start, end = max(records(source / OPTIMIZER), key=lambda one: one[0].file_size)
    flip(source / OPTIMIZER, (start + end) // 2, 2)
    assert main(["verify", str(source)]) == 1
    assert f"its record {info.filename} does not fit" in capsys.readouterr().out


def test_verify_of_nothing_to_compare_is_no_success(made, tmp_path, capsys):
    out = shutil.copytree(made["transformers"], tmp_path / "out")
    (out / MANIFEST).unlink()
    refused(capsys, main(["verify", str(out)]), "nothing was compared", "--against SRC")


# ------------------------------------------------------------------------------------------------
# going on


def test_a_staged_file_that_was_damaged_is_written_again(tmp_path, monkeypatch, capsys):
    assert run(GOLDEN, tmp_path / "right") == 0

    def stopped(*_):
        raise TaskError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "publish", stopped)
        assert run(GOLDEN, tmp_path / "out") == 3
    (staged,) = (tmp_path / ".out.parammap/out").rglob("*.ckpt")
    flip(staged, staged.stat().st_size // 2, 4)
    assert run(GOLDEN, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "right")


# ------------------------------------------------------------------------------------------------
# any bit at all


def test_any_flipped_bit_of_a_source_is_refused_or_makes_no_difference(source, tmp_path, capsys):
    rng = random.Random(13)
    assert run(source, tmp_path / "right") == 0
    right, refusals = contents(tmp_path / "right"), 0
    files = sorted((source / "iter_0000002").rglob("*.pt"))
    for _ in range(16):
        path = rng.choice(files)
        at = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, *at)
        capsys.readouterr()
        status = run(source, tmp_path / "out")
        if status in (2, 3):
            refusals += 1
            refused(capsys, status)
        else:
            assert contents(tmp_path / "out") == right, (path, at)
        flip(path, *at)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert refusals > 12
