"""Megatron → MindSpore → Megatron on real checkpoints: what torch loads at the end is what it
loaded at the beginning.

Compared by torch alone: every tensor of the model file and every used element of the optimizer's
buffers bit for bit, all metadata equal. Not equal by design: padding and gaps in the buffers
(Megatron leaves garbage there, we write zeros)."""

import json
import zipfile

import pytest
import torch

from convert import convert_ckpt2pt
from parammap.cli.main import main
from tests.support import paths
from tests.support.runs import every_run
from tests.support.torch_load import torch_load
from tests.support.variants import DEFECTS, VARIANTS
from tests.support.way_back import (
    assert_equal,
    assert_optimizer_equal,
    layouts,
    live_of_run,
    rank_folders,
)

DATA = paths.TESTS / "data" / "megatron"
GOLDENS = [
    "cac60ce4_patched_legacy_tp2pp2",
    "cac60ce4_patched_legacy_pp4vpp2",
    "cac60ce4_patched_legacy_pp2dp3_untied_padded",
]


def there_and_back(source, tmp_path, *flags, form="ckpt"):
    assert (
        main(
            [
                "convert",
                str(source),
                str(tmp_path / "ms"),
                "--to",
                "mindspore",
                "--format",
                form,
                *flags,
            ]
        )
        == 0
    )
    assert (
        main(["convert", str(tmp_path / "ms"), str(tmp_path / "back"), "--to", "megatron", *flags])
        == 0
    )
    return tmp_path / "back"


def live_of_golden(source, folder):
    for path in (source / "truth").glob("rank*.json"):
        live = json.loads(path.read_text())
        pipeline = folder.split("_")[3:]
        if (
            live["dp"] == 0
            and live["tp"] == int(folder.split("_")[2])
            and live["pp"] == int((pipeline or ["0"])[0])
        ):
            return [live["chunks"]]
    raise AssertionError(folder)


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
@pytest.mark.parametrize("name", GOLDENS)
def test_goldens_come_back(name, form, tmp_path):
    back = there_and_back(DATA / name, tmp_path, form=form)
    ours, theirs = rank_folders(back), rank_folders(DATA / name)
    assert set(ours) == set(theirs)
    for folder in theirs:
        assert_equal(
            torch_load(ours[folder] / "model_optim_rng.pt"),
            torch_load(theirs[folder] / "model_optim_rng.pt"),
        )
        optimizers = [
            torch.load(root[folder] / "distrib_optim.pt", weights_only=True)
            for root in (ours, theirs)
        ]
        assert_optimizer_equal(*optimizers, live_of_golden(DATA / name, folder))
    assert (back / "latest_checkpointed_iteration.txt").read_text() == "2"


@every_run(*(variant for variant in VARIANTS if variant not in DEFECTS))
def test_trained_checkpoints_come_back(trained_variant, tmp_path, core, variant):
    run = trained_variant(core, variant)
    back = there_and_back(run.path, tmp_path)
    ours, theirs = rank_folders(back), rank_folders(run.path)
    assert set(ours) == set(theirs)
    for folder in theirs:
        assert_equal(
            torch_load(ours[folder] / "model_optim_rng.pt"),
            torch_load(theirs[folder] / "model_optim_rng.pt"),
        )
        optimizers = [
            torch.load(root[folder] / "distrib_optim.pt", weights_only=True)
            for root in (ours, theirs)
        ]
        assert_optimizer_equal(*optimizers, live_of_run(run, folder))
    assert layouts(back) == layouts(run.path)


def test_the_way_back_can_go_forth_again(tmp_path):
    source = DATA / GOLDENS[0]
    back = there_and_back(source, tmp_path)
    assert main(["convert", str(back), str(tmp_path / "again"), "--to", "mindspore"]) == 0
    for path in (tmp_path / "ms").rglob("network.ckpt"):
        assert (
            path.read_bytes()
            == (tmp_path / "again" / path.relative_to(tmp_path / "ms")).read_bytes()
        )


def test_torch_files_are_sound_zip_archives(tmp_path):
    """CRCs are right, which torch.load does not check, and files load memory-mapped."""
    back = there_and_back(DATA / GOLDENS[0], tmp_path)
    files = list(back.glob("iter_*/mp_rank_*/*.pt"))
    assert len(files) == 8
    for path in files:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    mapped = torch.load(
        next(back.glob("iter_*/mp_rank_00_000/distrib_optim.pt")), weights_only=True, mmap=True
    )
    assert mapped[0]


def test_weights_only_comes_back(tmp_path):
    source = DATA / "cac60ce4_mcore_pp2dp2_llama"
    back = there_and_back(source, tmp_path, "--weights-only")
    for folder, path in rank_folders(source).items():
        ours, theirs = (
            torch_load(p / "model_optim_rng.pt") for p in (rank_folders(back)[folder], path)
        )
        assert_equal(ours["model"], theirs["model"])
        assert not (rank_folders(back)[folder] / "distrib_optim.pt").exists()


def old_entry_point(tmp_path, *flags):
    return convert_ckpt2pt.main(
        [
            "--num-layers",
            "4",
            "--dp-size",
            "1",
            "--cp-size",
            "1",
            "--tp-size",
            "2",
            "--pp-size",
            "2",
            "--vpp-size",
            "1",
            "--ms-path",
            str(tmp_path / "ms"),
            "--param-map-path",
            str(tmp_path / "ms/pt_meta"),
            "--megatron-path",
            str(tmp_path / "back"),
            *flags,
        ]
    )


def test_the_entry_point_that_users_know(tmp_path, capsys):
    source = DATA / GOLDENS[0]
    assert main(["convert", str(source), str(tmp_path / "ms"), "--to", "mindspore"]) == 0
    assert old_entry_point(tmp_path, "--process-limit", "2") == 0
    assert capsys.readouterr().out.count("successfully") == 4
    for folder, path in rank_folders(source).items():
        ours = rank_folders(tmp_path / "back")[folder]
        assert_equal(
            torch_load(ours / "model_optim_rng.pt"), torch_load(path / "model_optim_rng.pt")
        )
    assert old_entry_point(tmp_path, "--src-model-format", "safetensors") == 2
    assert ".safetensors" in capsys.readouterr().err


def test_wrong_sizes_are_refused(tmp_path, capsys):
    assert main(["convert", str(DATA / GOLDENS[0]), str(tmp_path / "ms"), "--to", "mindspore"]) == 0
    for flag, value in (
        ("--tp-size", "4"),
        ("--num-layers", "8"),
        ("--vpp-size", "2"),
        ("--dp-size", "3"),
    ):
        assert old_entry_point(tmp_path, flag, value) == 2, flag
    assert not (tmp_path / "back").exists()


def test_layers_that_do_nothing_are_left_out(tmp_path):
    """MindSpeed-Core-MS numbers layers 0, 1, 3, 4 where 2 and 5 do nothing; written by MindSpore
    itself."""
    import subprocess
    import sys

    assert main(["convert", str(DATA / GOLDENS[0]), str(tmp_path / "ms"), "--to", "mindspore"]) == 0
    renumber = """
import sys, re, mindspore
for file in sys.argv[1:]:
    parameters = mindspore.load_checkpoint(file)
    number = lambda match: str([0, 1, 3, 4][int(match[0])])
    moved = {re.sub(r"(?<=layers\\.)\\d", number, name): value for name, value in parameters.items()}
    first = [(name, value) for name, value in moved.items() if "layers.0" in name]
    idle = [(name.replace("layers.0", f"layers.{n}"), value) for n in (2, 5) for name, value in first]
    import os; os.remove(file)
    mindspore.save_checkpoint([{"name": n, "data": v} for n, v in [*moved.items(), *idle]], file)
"""
    files = [str(path) for path in (tmp_path / "ms").rglob("network.ckpt")]
    subprocess.run([sys.executable, "-c", renumber, *files], check=True, capture_output=True)
    assert old_entry_point(tmp_path, "--num-layers", "6", "--noop", "2", "5") == 0
    for folder, path in rank_folders(DATA / GOLDENS[0]).items():
        ours = rank_folders(tmp_path / "back")[folder]
        assert_equal(
            torch_load(ours / "model_optim_rng.pt")["model"],
            torch_load(path / "model_optim_rng.pt")["model"],
        )


def test_training_that_went_on_in_mindspore_moves_the_counters(tmp_path):
    """Step, iteration, rate and schedule come from what MindSpore saved; the rest of the metadata
    stays."""
    import subprocess
    import sys

    source = DATA / GOLDENS[0]
    assert main(["convert", str(source), str(tmp_path / "ms"), "--to", "mindspore"]) == 0
    advance = """
import sys, os, mindspore, numpy as np
new = {"step_num": np.int64(7), "state_step": np.array([7], np.float32), "num_steps": np.int64(56),
       "learning_rate_group_0": np.float64(0.00125), "learning_rate_group_1": np.float64(0.00125)}
for file in sys.argv[1:]:
    parameters = mindspore.load_checkpoint(file)
    os.remove(file)
    for name, value in parameters.items():
        if "." in name and not name.endswith("layernorm.weight"):  # the norms are frozen
            parameters[name] = mindspore.Tensor(value.asnumpy() * np.float32(1.5))
    parameters.update({name: mindspore.Tensor(value) for name, value in new.items()})
    mindspore.save_checkpoint([{"name": name, "data": value} for name, value in parameters.items()], file)
"""
    files = [str(path) for path in (tmp_path / "ms").rglob("network.ckpt")]
    subprocess.run([sys.executable, "-c", advance, *files], check=True, capture_output=True)
    assert main(["convert", str(tmp_path / "ms"), str(tmp_path / "back"), "--to", "megatron"]) == 0
    assert (tmp_path / "back/latest_checkpointed_iteration.txt").read_text() == "7"
    ours = torch_load(tmp_path / "back/iter_0000007/mp_rank_00_000/model_optim_rng.pt")
    theirs = torch_load(source / "iter_0000002/mp_rank_00_000/model_optim_rng.pt")
    assert ours["iteration"] == 7 and ours["opt_param_scheduler"]["num_steps"] == 56
    for mine, original in zip(
        ours["optimizer"]["optimizer"]["param_groups"],
        theirs["optimizer"]["optimizer"]["param_groups"],
        strict=True,
    ):
        assert mine["step"] == 7 and isinstance(mine["step"], int) and mine["lr"] == 0.00125
        assert {k: v for k, v in mine.items() if k not in ("step", "lr")} == {
            k: v for k, v in original.items() if k not in ("step", "lr")
        }
    assert (
        ours["args"].consumed_train_samples
        == theirs["args"].consumed_train_samples + 5 * theirs["args"].global_batch_size
    )
