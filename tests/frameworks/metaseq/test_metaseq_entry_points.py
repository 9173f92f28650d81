"""The scripts that metaseq's users know, flag by flag. Tests named after a defect show what those
scripts get wrong (main f7ffa5f and 809e49c: distributed/stitch_fsdp_ckpt.py,
scripts/reshard_fsdp.py, scripts/reshard_mp.py)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convert.consolidate_fsdp_shards import main as consolidate_fsdp_shards
from convert.convert_to_singleton import main as convert_to_singleton
from convert.reshard_fsdp import main as reshard_fsdp
from convert.reshard_mp import main as reshard_mp
from tests.support import paths
from tests.support.torch_load import torch_load

ROOT = paths.ROOT
DATA = ROOT / "tests/data/metaseq"
FP16, FP32 = DATA / "mp2dp2_fp16", DATA / "mp1dp3_fp32"
HEAD, EMBEDDING = "decoder.output_projection.weight", "decoder.embed_tokens.weight"
#: options of tests/support/fsdp.py
SOURCES = {
    "unnested": {"parts": 2, "shards": 2, "nested": False},
    "empty_root": {"shards": 2, "empty_root": True},
    "eleven_parts": {
        "parts": 11,
        "shards": 1,
        "heads": 11,
        "hidden": 11,
        "ffn": 11,
        "vocab": 22,
        "layers": 1,
    },
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a checkpoint by fairscale's FSDP for each source; to be read only."""
    folder = tmp_path_factory.mktemp("fsdp")
    (folder / "options.json").write_text(
        json.dumps([{"folder": str(folder / n), **given} for n, given in SOURCES.items()])
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.fsdp", folder / "options.json"],
        check=True,
        cwd=ROOT,
        timeout=900,
    )
    return folder


@pytest.fixture
def raw(tmp_path):
    """raw(golden): a folder with metaseq's own shards, to spoil."""

    def copied(golden: Path) -> Path:
        folder = tmp_path / "raw"
        folder.mkdir()
        for path in golden.glob("checkpoint_3-*.pt"):
            shutil.copy(path, folder)
        return folder

    return copied


def edit(path: Path, change) -> None:
    content = torch_load(path)
    content["extra_state"]["train_iterator"]["tokenization_cache"] = None  # of a class of metaseq's
    change(content)
    torch.save(content, path)


def truths(folder: Path, parts: int) -> list[dict]:
    form = "truth/part{}.pt" if (folder / "truth").is_dir() else "truth-part{}.pt"
    loaded = [torch_load(folder / form.format(part)) for part in range(parts)]
    return [one.get("model") or one["weight"] for one in loaded]


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys() and len(left) > 3
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


def script(name: str, *flags: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / f"convert/{name}.py", *map(str, flags)],
        capture_output=True,
        text=True,
    )


# ------------------------------------------------------------------------------------------------------
# convert_to_singleton


@pytest.mark.parametrize("flat", [False, True], ids=["whole", "shards"])
def test_a_singleton_is_put_into_the_folder_of_its_parts(flat, tmp_path):
    location = tmp_path / "opt"
    location.mkdir()
    (location / "dict.txt").write_text("kept")
    for path in FP16.glob("checkpoint_3-*.pt") if flat else (FP16 / "up/rf1").glob("*.pt"):
        shutil.copy(path, location / path.name.replace("checkpoint_3", "reshard"))
    before = {path.name: path.read_bytes() for path in location.iterdir()}
    run = script("convert_to_singleton", location)
    assert run.returncode == 0, run.stderr
    assert {path.name for path in location.iterdir()} == {
        *before,
        "restored.pt",
        "restored.parammap_manifest.json",
    }
    assert all((location / name).read_bytes() == content for name, content in before.items())
    ours, theirs = torch_load(location / "restored.pt"), torch_load(FP16 / "up/stitched.pt")
    assert_same(ours["model"], theirs["model"])
    assert list(ours["model"]) == list(theirs["model"])  # and in the same order
    assert theirs.keys() <= ours.keys() and "last_optimizer_state" not in ours
    assert (ours["cfg"]["model"].arch, ours["cfg"]["model"].model_parallel_size) == (
        "transformer_lm_megatron",
        1,
    )
    again = script("convert_to_singleton", location)
    assert again.returncode == 2 and "restored.pt: is there already" in again.stderr
    assert script("convert_to_singleton", location, "--overwrite").returncode == 0


def test_raw_parts_and_shards_become_a_singleton_as_well(raw):
    folder = raw(FP16)
    assert convert_to_singleton([str(folder)]) == 0
    made, name = (
        torch_load(folder / "restored.pt")["model"],
        "decoder.layers.0.self_attn.{}_proj.weight",
    )
    thirds = [truth[name.format("qkv")].chunk(3) for truth in truths(FP16, 2)]
    for own, parts in zip("kvq", zip(*thirds, strict=True), strict=True):
        assert torch.equal(made[name.format(own)], torch.cat(parts))


def test_a_singleton_can_be_loaded_without_metaseq(tmp_path):
    shutil.copytree(FP16 / "up/rf1", tmp_path / "opt")
    assert convert_to_singleton([str(tmp_path / "opt"), "--drop-metaseq-req"]) == 0
    torch.load(tmp_path / "opt/restored.pt", weights_only=False)
    with pytest.raises(ModuleNotFoundError):
        torch.load(tmp_path / "opt/reshard-model_part-0.pt", weights_only=False)


# ---------------------------------------------------------------------------------------------------
# consolidate_fsdp_shards


def test_consolidated_beside_the_shards(raw):
    folder = raw(FP16)
    assert script("consolidate_fsdp_shards", folder / "checkpoint_3.pt").returncode == 0
    ours, theirs = (
        torch_load(folder / "checkpoint_3_consolidated.pt"),
        torch_load(FP16 / "up/stitched.pt"),
    )
    assert_same(ours["model"], theirs["model"])
    assert ours["cfg"]["model"]._name == theirs["cfg"]["model"]._name


def test_consolidated_with_all_its_flags(tmp_path):
    source, one = str(FP16 / "checkpoint_3"), tmp_path / "one"
    assert (
        consolidate_fsdp_shards(
            [
                source,
                "--save-prefix",
                str(tmp_path / "new/opt"),
                "--strict",
                "--new-arch-name",
                "other",
                "--no-stitch-megatron",
                "True",
            ]
        )
        == 0
    )
    assert consolidate_fsdp_shards([source, "--save-prefix", str(one), "--megatron-part", "1"]) == 0
    for part, truth in enumerate(truths(FP16, 2)):
        content = torch_load(tmp_path / f"new/opt-model_part-{part}.pt")
        assert torch.equal(content["model"].pop(HEAD), truth[EMBEDDING])
        assert_same(content["model"], truth)
        assert content["cfg"]["model"]._name == "other"
    assert_same(
        *(
            torch_load(f"{prefix}-model_part-1.pt")["model"]
            for prefix in (one, tmp_path / "new/opt")
        )
    )
    assert not (tmp_path / "one-model_part-0.pt").exists()


def test_the_moving_average_of_the_weights(raw, capsys):
    folder = raw(FP32)
    assert consolidate_fsdp_shards([str(folder / "checkpoint_3"), "--is-ema"]) == 2
    assert "moving average" in capsys.readouterr().err
    for path in folder.glob("*.pt"):
        edit(
            path,
            lambda content: content["extra_state"].update(
                ema={name: tensor * 2 for name, tensor in content["model"].items()}
            ),
        )
    assert (
        consolidate_fsdp_shards([str(folder / "checkpoint_3"), "--is-ema", "--no-stitch-megatron"])
        == 0
    )
    content, (truth,) = (
        torch_load(folder / "checkpoint_3_consolidated-model_part-0.pt"),
        truths(FP32, 1),
    )
    assert torch.equal(content["model"][EMBEDDING], truth[EMBEDDING] * 2)


# -------------------------------------------------------------------------------------------------------------
# reshard_fsdp


def test_part_by_part_as_metaseqs_documents_do_it(tmp_path):
    for part, truth in enumerate(truths(FP16, 2)):
        name = f"reshard-model_part-{part}.pt"
        run = script(
            "reshard_fsdp",
            "--input",
            FP16 / f"checkpoint_3-model_part-{part}-shard*.pt",
            "--output",
            tmp_path / "out" / name,
            "--num-output-shards",
            1,
            "--skip-optimizer-state",
            True,
            "--unflatten-weights",
            True,
        )
        assert run.returncode == 0, run.stderr
        ours, theirs = (torch_load(folder / name) for folder in (tmp_path / "out", FP16 / "up/rf1"))
        assert_same({name: tensor for name, tensor in ours["model"].items() if name != HEAD}, truth)
        assert ours["shard_metadata"] == theirs["shard_metadata"] and theirs.keys() <= ours.keys()
    assert len(list((tmp_path / "out").glob("*.pt"))) == 2


def test_whole_tensors_in_several_shards_are_refused(tmp_path, capsys):
    assert (
        reshard_fsdp(
            [
                "--input",
                f"{FP16}/checkpoint_3-*.pt",
                "--output",
                str(tmp_path / "out/{part}-{i}.pt"),
                "--num-output-shards",
                "2",
                "--unflatten-weights",
            ]
        )
        == 2
    )
    assert "--unflatten-weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("nothing*.pt", "matches no .pt file"), ("*.pt", "files of 2 checkpoints")],
)
def test_a_pattern_names_one_checkpoint(pattern, said, tmp_path, capsys):
    assert reshard_fsdp(["--input", f"{FP32}/{pattern}", "--output", str(tmp_path / "out.pt")]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert (
        reshard_fsdp(
            [
                "--input",
                f"{FP32}/checkpoint_3-*.pt",
                "--output",
                str(tmp_path / "out/x.pt"),
                "--dry-run",
            ]
        )
        == 0
    )
    assert "x.pt" in capsys.readouterr().out and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------
# reshard_mp


def test_as_the_script_of_2022_has_it(tmp_path):
    run = script("reshard_mp", FP16 / "checkpoint_3", tmp_path / "out", "--target-ddp-size", 2)
    assert run.returncode == 0, run.stderr
    for part in range(2):
        for shard in range(2):
            ours, theirs = (
                torch_load(folder / f"reshard-model_part-{part}-shard{shard}.pt")
                for folder in (tmp_path / "out", FP16 / "up/y2022_2")
            )
            assert_same(ours["model"], theirs["model"])
            for number, states in theirs["last_optimizer_state"]["state"].items():
                assert torch.equal(
                    states["exp_avg"], ours["last_optimizer_state"]["state"][number]["exp_avg"]
                )
            assert ours.keys() - theirs.keys() == {"shard_metadata"}  # which it loses
    assert (
        reshard_mp(
            [
                str(FP16 / "checkpoint_3"),
                str(tmp_path / "one"),
                "--target-ddp-size",
                "1",
                "--part",
                "1",
                "--drop-optimizer-state",
            ]
        )
        == 0
    )
    (file,) = (tmp_path / "one").glob("*.pt")
    assert file.name == "reshard-model_part-1.pt" and "last_optimizer_state" not in torch_load(file)


def test_what_the_script_of_2022_wrote_needs_the_metadata_it_lost(tmp_path, capsys):
    flags = [
        "--input",
        f"{FP16}/up/y2022_2/*.pt",
        "--output",
        str(tmp_path / "out/{i}-{shard}.pt"),
        "--num-output-parts",
        "2",
        "--target-ddp-size",
        "3",
    ]
    assert reshard_mp(flags) == 2
    assert "--metadata-from" in capsys.readouterr().err
    assert reshard_mp([*flags, "--metadata-from", str(FP16 / "checkpoint_3")]) == 0
    for part in range(2):
        for shard in range(3):
            ours = torch_load(tmp_path / f"out/{part}-{shard}.pt")
            theirs = torch_load(FP16 / f"up/rf_n3/checkpoint_3-model_part-{part}-shard{shard}.pt")
            assert_same(ours["model"], theirs["model"])
            assert ours["shard_metadata"] == theirs["shard_metadata"]


@pytest.mark.parametrize("flags", [["a"], ["--input", "a*.pt"], ["a", "b", "--output", "c"], []])
def test_one_form_of_flags_or_the_other(flags, capsys):
    assert reshard_mp(flags) == 2
    assert "--input" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- what
# metaseq's own scripts get wrong


def test_optimizer_padding_is_removed(tmp_path):
    assert (
        reshard_fsdp(
            [
                "--input",
                f"{FP32}/checkpoint_3-*.pt",
                "--output",
                str(tmp_path / "out/shard{i}.pt"),
                "--unflatten-weights",
                "False",
            ]
        )
        == 0
    )
    ours, theirs = (
        torch_load(tmp_path / "out/shard0.pt"),
        torch_load(FP32 / "up/rf_n1/checkpoint_3-model_part-0-shard0.pt"),
    )
    sizes = [
        [
            content["last_optimizer_state"]["state"][1]["exp_avg"].numel()
            for content in (ours, theirs)
        ],
        [content["model"]["decoder.layers.0.flat_param_0"].numel() for content in (ours, theirs)],
    ]
    assert sizes == [[3584, 3585], [3584, 3584]]


def test_output_dtype_with_optimizer_state(tmp_path):
    assert (
        reshard_fsdp(
            [
                "--input",
                f"{FP32}/checkpoint_3-*.pt",
                "--output",
                str(tmp_path / "out/x.pt"),
                "--output-dtype",
                "bf16",
            ]
        )
        == 0
    )
    content, (truth,) = torch_load(tmp_path / "out/x.pt"), truths(FP32, 1)
    assert torch.equal(content["model"][EMBEDDING], truth[EMBEDDING].bfloat16())
    assert content["last_optimizer_state"]["state"][0]["exp_avg"].dtype == torch.float32


def test_shared_parameters_are_kept_and_share_their_storage(tmp_path):
    assert (
        reshard_fsdp(
            ["--input", f"{FP32}/checkpoint_3-*.pt", "--output", str(tmp_path / "out/x.pt")]
        )
        == 0
    )
    model = torch_load(tmp_path / "out/x.pt")["model"]
    assert model[HEAD].data_ptr() == model[EMBEDDING].data_ptr()


def test_the_output_projection_of_an_unnested_model_has_all_parts_rows(written, tmp_path):
    assert (
        reshard_mp(
            ["--input", f"{written / 'unnested'}/*.pt", "--output", str(tmp_path / "out/x.pt")]
        )
        == 0
    )
    model = torch_load(tmp_path / "out/x.pt")["model"]
    whole = torch.cat([truth[EMBEDDING] for truth in truths(written / "unnested", 2)])
    assert torch.equal(model[HEAD], whole) and torch.equal(model[EMBEDDING], whole)


def test_an_empty_root_is_no_hindrance(written, tmp_path):
    source = written / "empty_root"
    assert (
        consolidate_fsdp_shards(
            [
                str(source / "checkpoint_3"),
                "--save-prefix",
                str(tmp_path / "x"),
                "--no-stitch-megatron",
            ]
        )
        == 0
    )
    assert_same(torch_load(tmp_path / "x-model_part-0.pt")["model"], truths(source, 1)[0])


def test_a_missing_shard_is_not_accepted(raw, tmp_path, capsys):
    folder = raw(FP16)
    (folder / "checkpoint_3-model_part-1-shard1.pt").unlink()
    for command, *flags in (
        (
            consolidate_fsdp_shards,
            str(folder / "checkpoint_3"),
            "--save-prefix",
            str(tmp_path / "x"),
        ),
        (reshard_fsdp, "--input", f"{folder}/*.pt", "--output", str(tmp_path / "out/{part}.pt")),
    ):
        assert command(flags) == 2
        assert "the first is part 1 shard 1" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_heads_are_not_cut(tmp_path, capsys):
    assert (
        reshard_mp(
            [
                "--input",
                f"{FP16}/up/rf1/*.pt",
                "--output",
                str(tmp_path / "out/{i}.pt"),
                "--num-output-parts",
                "8",
            ]
        )
        == 2
    )
    assert "4 attention heads cannot be divided" in capsys.readouterr().err and not list(
        tmp_path.iterdir()
    )


def test_unknown_tensors_are_not_dropped(tmp_path, capsys):
    shutil.copytree(FP16 / "up/rf1", tmp_path / "in")
    for path in (tmp_path / "in").iterdir():
        edit(
            path,
            lambda content: content["model"].update({"decoder.adapter.weight": torch.ones(3, 3)}),
        )
    flags = ["--input", f"{tmp_path}/in/*.pt", "--output", str(tmp_path / "out/{i}.pt")]
    assert reshard_mp(flags) == 2
    assert "decoder.adapter.weight" in capsys.readouterr().err
    assert reshard_mp([*flags, "--num-output-parts", "2"]) == 0
    assert torch.equal(
        torch_load(tmp_path / "out/1.pt")["model"]["decoder.adapter.weight"], torch.ones(3, 3)
    )


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_replicas_that_diverged_are_refused_with_positions(value, tmp_path, capsys):
    shutil.copytree(FP16 / "up/rf1", tmp_path / "in")
    name = "decoder.layers.1.final_layer_norm.weight"

    def change(content):
        content["model"][name] = content["model"][name].clone()
        content["model"][name][7] = value

    edit(tmp_path / "in/reshard-model_part-1.pt", change)
    flags = ["--input", f"{tmp_path}/in/*.pt", "--output", str(tmp_path / "out/{i}.pt")]
    assert reshard_mp(flags) == 2
    said = capsys.readouterr().err
    assert (
        "layers.1.post_attention_norm.weight" in said
        and "1 elements differ, first at row 7" in said
    )
    assert not (tmp_path / "out").exists()
    assert reshard_mp([*flags, "--replicas", "first"]) == 0
    assert torch.equal(torch_load(tmp_path / "out/0.pt")["model"][name], truths(FP16, 2)[0][name])


def test_part_1_is_not_part_10(written, tmp_path):
    source = written / "eleven_parts"
    assert (
        consolidate_fsdp_shards(
            [
                str(source / "checkpoint_3"),
                "--save-prefix",
                str(tmp_path / "x"),
                "--megatron-part",
                "1",
            ]
        )
        == 0
    )
    model = torch_load(tmp_path / "x-model_part-1.pt")["model"]
    model.pop(HEAD, None)
    truth = truths(source, 11)[1]
    truth.pop(HEAD, None)
    assert_same(model, truth)


def test_files_are_as_large_as_their_tensors(tmp_path):
    assert (
        reshard_mp(
            [
                "--input",
                f"{FP16}/up/rf1/*.pt",
                "--output",
                str(tmp_path / "out/{i}.pt"),
                "--num-output-parts",
                "4",
            ]
        )
        == 0
    )
    for path in (tmp_path / "out").glob("*.pt"):
        model = torch_load(path)["model"]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in model.values())


def test_nothing_in_a_checkpoint_is_run(raw, tmp_path):
    """metaseq's scripts need unsafe unpickling; these need neither metaseq, whose classes rank 0's
    file names, nor torch."""
    code = "import sys; sys.modules['torch'] = None; from convert.reshard_fsdp import main; sys.exit(main())"
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "--input",
            f"{FP16}/checkpoint_3-*.pt",
            "--output",
            str(tmp_path / "out/{part}.pt"),
        ],
        cwd=ROOT,
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr
