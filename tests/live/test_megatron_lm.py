"""With MEGATRON_LM=<git checkout>: the patch on every release, and Megatron-LM's own
pretrain_gpt.py with the hook.

pretrain_gpt.py also wants `regex`, `pyyaml` and (from 0.16 on) `pydantic` to be installed.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.mindspore_proof import PREFIXES, lowest_rank, mindspore_name
from examples.tiny.trained import Trained
from parammap.cli.main import main
from patches.make_patches import MEGATRON_HEADER
from tests.support import check_sidecar, mlm_entry
from tests.support.goldens import mindspore_name as mindspore_legacy_name
from tests.support.megatron_lm import (
    CHECKOUT,
    MOCK_VOCAB,
    TP2_PP2,
    needs_checkout,
    needs_its_packages,
)
from tests.support.mindspore_load import load
from tests.support.torch_load import torch_load
from tests.support.way_back import assert_equal, assert_optimizer_equal, live_of_run, rank_folders

RELEASES = ["cac60ce4", *(f"core_r0.{minor}.0" for minor in range(6, 20)), "main"]

MOE_EP2 = "--expert-model-parallel-size 2 --num-experts 4 --moe-router-topk 2 --overlap-grad-reduce"
VPP = "--pipeline-model-parallel-size 4 --num-layers 8 --num-layers-per-virtual-pipeline-stage 1 --overlap-grad-reduce"
DP3 = (
    "--pipeline-model-parallel-size 2 --global-batch-size 12 --untie-embeddings-and-output-weights "
    "--overlap-grad-reduce"
)

#: case -> release, processes, flags, elements per bucket
CASES = {
    "cac60ce4_legacy_tp2pp2": ("cac60ce4", 4, TP2_PP2, 20_000),
    "cac60ce4_legacy_vpp": ("cac60ce4", 4, VPP, 20_000),
    "cac60ce4_legacy_dp3_padded": ("cac60ce4", 6, f"{DP3} --vocab-size 129", 12_000),
    "cac60ce4_mcore_moe": ("cac60ce4", 4, f"--use-mcore-models {MOE_EP2}", 20_000),
    "core_r0.8.0_dp3_padded": ("core_r0.8.0", 6, f"{DP3} {MOCK_VOCAB}", 20_000),
    "core_r0.12.0_moe": (
        "core_r0.12.0",
        4,
        f"{MOE_EP2} --disable-bias-linear --hidden-size 128 {MOCK_VOCAB}",
        20_000,
    ),
    "core_r0.16.0_tp2pp2": ("core_r0.16.0", 4, f"{TP2_PP2} --hidden-size 128", 20_000),
    "main_tp2pp2": ("main", 4, f"{TP2_PP2} --hidden-size 128", 20_000),
}
#: checkpoints that MindSpeed-Core-MS's own patch wrote of the same runs, in tests/data/megatron
BY_THE_EXISTING_PATCH = {
    "cac60ce4_legacy_tp2pp2": "cac60ce4_patched_legacy_tp2pp2",
    "cac60ce4_legacy_vpp": "cac60ce4_patched_legacy_pp4vpp2",
    "cac60ce4_legacy_dp3_padded": "cac60ce4_patched_legacy_pp2dp3_untied_padded",
}
ALSO_BY_LAUNCHER = ("cac60ce4_legacy_tp2pp2", "core_r0.12.0_moe", "core_r0.16.0_tp2pp2")


@pytest.fixture(scope="module")
def megatron_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """megatron_run(case, launcher=None): the checkpoint of that case, trained once."""
    runs: dict[Any, Trained] = {}

    def run(case: str, launcher: str | None = None) -> Trained:
        if (case, launcher) not in runs:
            release, processes, flags, bucket = CASES[case]
            runs[case, launcher] = mlm_entry.train(
                CHECKOUT,
                release,
                tmp_path_factory.mktemp(case),
                processes,
                flags.split(),
                bucket,
                launcher,
            )
        return runs[case, launcher]

    return run


@needs_checkout
@pytest.mark.parametrize("release", RELEASES)
def test_patch_applies(release, tmp_path):
    commit = mlm_entry.resolve(CHECKOUT, release)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    archive = ["git", "-C", CHECKOUT, "archive", commit, "megatron/training"]
    tree = subprocess.run(archive, check=True, capture_output=True)
    subprocess.run(["tar", "x", "-C", tmp_path], input=tree.stdout, check=True)
    patch = mlm_entry.ROOT / "patches/param_map.patch"
    for command in (["git", "apply", "--check", patch], ["patch", "-p1", "--dry-run", "-i", patch]):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "fuzz" not in result.stdout
    subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True)
    patched = (tmp_path / "megatron/training/checkpointing.py").read_text()
    body = patched[patched.index("\ndef save_checkpoint(") :]
    body = body[: body.index("\ndef ", 1)]
    call = "    save_param_map(args, iteration, model, optimizer, checkpoint_name)\n\n    # Collect args, model, RNG.\n"
    assert patched.count("save_param_map(") == body.count(call) == 1
    compile(patched, "checkpointing.py", "exec")


@needs_checkout
def test_added_files_begin_as_megatron_s_own_check_wants():
    file = f"{mlm_entry.resolve(CHECKOUT, 'main')}:tools/check_copyright.py"
    check = subprocess.run(
        ["git", "-C", CHECKOUT, "show", file], check=True, capture_output=True, text=True
    )
    rules: dict[str, Any] = {"__name__": "check_copyright"}
    exec(check.stdout, rules)
    assert rules["EXPECTED_HEADER"].format(2026) + "\n" == MEGATRON_HEADER


@needs_checkout
@needs_its_packages
@pytest.mark.parametrize("case", CASES)
def test_patched_training_writes_right_sidecars(case, megatron_run):
    assert check_sidecar.check(megatron_run(case)) > 0


@needs_checkout
@needs_its_packages
@pytest.mark.parametrize("case", BY_THE_EXISTING_PATCH)
def test_maps_are_the_existing_patch_s_byte_for_byte(case, megatron_run):
    theirs = mlm_entry.ROOT / "tests/data/megatron" / BY_THE_EXISTING_PATCH[case] / "param_map"
    expected = {
        file.name: file.read_bytes() for file in theirs.glob("*_dp0*")
    }  # it also writes one of each dp rank
    written = {
        file.name: file.read_bytes()
        for file in (megatron_run(case).path / "param_map").glob("param_map_*")
    }
    assert written == expected


@needs_checkout
@needs_its_packages
def test_layout_knows_legacy_names_and_the_true_vocabulary(megatron_run):
    folder = megatron_run("cac60ce4_legacy_tp2pp2").iteration_folder / "param_map"
    layout = json.loads((folder / "layout_tp01_pp001.json").read_text())
    params = {param["name"]: param for _, param in check_sidecar.layout_params(layout)}
    assert params["word_embeddings_for_head.weight"]["tied"]
    assert layout["chunks"][0]["layers"] == {"language_model.encoder.layers": [2, 3]}
    assert (
        layout["model"]["vocab_size"] == 128
    )  # NullTokenizer adds an end-of-document token to its 127


@needs_checkout
@needs_its_packages
@pytest.mark.parametrize("case", ALSO_BY_LAUNCHER)
def test_launcher_writes_the_same_sidecars_as_the_patch(case, megatron_run):
    patched, launched = (megatron_run(case, launcher) for launcher in (None, "parammap.hooks.run"))
    assert check_sidecar.check(launched) > 0
    assert sidecars(patched) == sidecars(launched)


def sidecars(run: Trained) -> dict[str, Any]:
    """Every JSON sidecar by name; of args, what does not tell where and when the run was."""
    folder = run.iteration_folder / "param_map"
    content = {file.name: json.loads(file.read_text()) for file in folder.glob("*.json")}
    for name, value in content.items():
        if name.startswith("args_"):
            value["args"] = {
                key: said
                for key, said in value["args"].items()
                if not isinstance(said, str) and key != "start_time"
            }
    model_copies = {Path(name).stem for name in content if name.startswith("args_")}
    assert model_copies == {file.stem for file in folder.glob("*.pt")}
    return content


@needs_checkout
@needs_its_packages
@pytest.mark.parametrize("case", CASES)
def test_what_it_saves_converts_exactly_and_comes_back(case, megatron_run, tmp_path):
    """To MindSpore: every array that MindSpore loads equals the live state. And back: every file
    loads as it was."""
    run = megatron_run(case)
    assert main(["convert", str(run.path), str(tmp_path / "ms"), "--to", "mindspore"]) == 0
    truths = run.truths()
    files = [tmp_path / "ms" / f"rank_{lowest_rank(truth)}" / "network.ckpt" for truth in truths]
    for truth, loaded in zip(truths, load(files, tmp_path / "loaded"), strict=True):
        states = {name for name in loaded if "." in name}
        expected = {
            prefix + named(truth, chunk, name): truth.array(chunk, name, role)
            for chunk, name in truth.names()
            for role, prefix in PREFIXES.items()
        }
        assert states == set(expected)
        for name, value in expected.items():
            assert np.array_equal(loaded[name].view(np.uint32), value.view(np.uint32)), name
    assert main(["convert", str(tmp_path / "ms"), str(tmp_path / "back"), "--to", "megatron"]) == 0
    ours, theirs = rank_folders(tmp_path / "back"), rank_folders(run.path)
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


def named(truth: Any, chunk: int, name: str) -> str:
    layers = truth.meta["layers"][chunk]
    if name.startswith(("language_model.", "word_embeddings_for_head")):
        return mindspore_legacy_name(
            name.replace("word_embeddings_for_head", "word_embeddings"), layers, layer_norm=True
        )
    return mindspore_name(name, layers, layer_norm=True)
