"""What is refused of Merak, as a source and as a target, with nothing written."""

import json
import re
import shutil

import pytest
import torch

from parammap.frameworks import registry
from parammap.frameworks.merak import files
from tests.support.archives import reseal
from tests.support.merak import (
    CONFIG,
    DATA,
    HF,
    SAID,
    TRACKER,
    WHOLE,
    as_run,
    convert,
    load,
    refused,
)


@pytest.fixture(scope="module")
def weights():
    return load(HF / "pytorch_model.bin")


@pytest.fixture
def run(tmp_path, weights):
    return as_run(tmp_path / "run", weights, config=SAID)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ("0,3,5,6", "must begin with 0 and end with 7, the modules of 4 layers"),
        ("1,3,5,7", "must begin with 0"),
        ("0,3,7", "has 3 numbers; --pp 3 takes 4"),
        ("0,3,3,7", "each number must be greater than the one before"),
    ],
)
def test_a_cut_list_of_another_model_is_refused(cut, message, tmp_path, capsys):
    flags = "--tp", "1", "--pp", "3", "--partition-method", "custom", "--custom-partition", cut
    assert message in refused(capsys, HF, tmp_path / "out", *flags)


def test_flags_that_contradict_are_refused(tmp_path, capsys):
    assert "a cut list goes with custom" in refused(
        capsys, HF, tmp_path / "out", "--custom-partition", "0,7"
    )
    assert "a cut list goes with custom" in refused(
        capsys, HF, tmp_path / "out", "--partition-method", "custom"
    )
    assert "has no iteration" in refused(capsys, HF, tmp_path / "out", "--folder", "iter")


def damaged(tmp_path, golden="stock_hf_to_tp2pp2"):
    shutil.copytree(DATA / golden, tmp_path / "damaged", copy_function=shutil.copy)
    return tmp_path / "damaged"


MISSING = {  # what is removed, message
    "a stage": (
        "release/mp_rank_0?_pp_rank_001",
        "lacks 28 tensors of GPT-2 of 3 layers|a stage is missing",
    ),
    "a rank": ("release/mp_rank_01_pp_rank_000", "rank tp1 pp0 is missing of tp 2 · pp 2"),
    "a file": (
        "release/mp_rank_01_pp_rank_001/partial_model_optim.pt",
        "partial_model_optim.pt: missing",
    ),
    "the folder": ("release", "release: no such folder|not a"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_refused(what, tmp_path, capsys):
    pattern, message = MISSING[what]
    source = damaged(tmp_path)
    for path in source.glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert re.search(message, refused(capsys, source, tmp_path / "out", "--config", CONFIG))


def test_a_missing_optimizer_file_is_refused(tmp_path, capsys):
    source = damaged(tmp_path, "zero_tp2pp2dp2")
    (source / "iter_0000005/zero_dp_rank_1_mp_rank_1_pp_rank_0_opt_states.pt").unlink()
    assert "the optimizer file of dp rank 1 of tp1 pp0 is missing" in refused(
        capsys, source, tmp_path / "out"
    )


def test_optimizer_files_of_fewer_ranks_are_refused(tmp_path, capsys):
    """Without any file of the last rank nothing but the number of elements tells."""
    source = damaged(tmp_path, "zero_tp2pp2dp2") / "iter_0000005"
    for path in source.glob("zero_dp_rank_1_*"):
        path.unlink()
    assert re.search(
        r"weight has \d+ elements in 1 files for parameters of \d+",
        refused(capsys, source, tmp_path / "out"),
    )


def test_an_optimizer_file_of_another_rank_is_refused(tmp_path, capsys):
    source = damaged(tmp_path, "zero_tp2pp2dp2") / "iter_0000005"
    stage, other = (
        source / f"zero_dp_rank_1_mp_rank_0_pp_rank_{pp}_opt_states.pt" for pp in range(2)
    )
    shutil.copy(other, stage)
    assert "its parameters are not those of" in refused(capsys, source, tmp_path / "out")


def test_an_optimizer_of_parameters_that_are_not_there_is_refused(tmp_path, capsys):
    source = damaged(tmp_path, "zero_tp2pp2dp2") / "iter_0000005"
    for path in source.glob("zero_*_mp_rank_0_pp_rank_0_*"):
        content = path.read_bytes()
        assert content.count(b"module.1.transformer.wpe.weight") == 1
        path.write_bytes(
            content.replace(b"module.1.transformer.wpe.weight", b"module.1.transformer.wpx.weight")
        )
        reseal(path)
    assert "holds no tensor for module.1.transformer.wpx.weight" in refused(
        capsys, source, tmp_path / "out"
    )


@pytest.mark.parametrize(
    "name", ["module.3.transformer.h.1.self_attention.dense.weight", "module.9.score.weight"]
)
def test_an_unknown_tensor_is_refused_by_name(name, tmp_path, weights, capsys):
    root = as_run(tmp_path / "run", weights)
    path = root / "iter_0000000_all_dp/model_optim.pt"
    content = load(path)
    content["model"][name] = torch.ones(2)
    torch.save(content, path)
    assert f"1 tensors are none of Merak's GPT-2: {name}" in refused(
        capsys, root, tmp_path / "out", "--config", CONFIG
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_layer", 5, "holds 4 layers and not 5"),
        ("n_embd", 64, "has hidden 32 and not 64"),
        ("n_inner", 99, "has ffn 128 and not 99"),
        ("n_positions", 8, "has positions 16 and not 8"),
        ("vocab_size", 99, "its table of words has 98 rows"),
        ("model_type", "opt", "is no configuration of GPT-2"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    field, value, message, tmp_path, weights, capsys
):
    config = {**SAID, field: value}
    assert message in refused(
        capsys, as_run(tmp_path / "run", weights, config=config), tmp_path / "out"
    )


def test_a_contradicting_config_flag_is_refused(run, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**SAID, "n_head": 8}))
    assert "says heads 8, and the model has 4" in refused(
        capsys, run, tmp_path / "out", "--config", other
    )


def test_an_adapter_is_refused(tmp_path, capsys):
    (tmp_path / "run/iter_0000003/mp_rank_00").mkdir(parents=True)
    torch.save(
        {"w": torch.ones(1)}, tmp_path / "run/iter_0000003/mp_rank_00/lora_partial_model_optim.pt"
    )
    (tmp_path / "run" / TRACKER).write_text("3")
    assert "holds a LoRA adapter (lora_partial_model_optim.pt)" in refused(
        capsys, tmp_path / "run", tmp_path / "out"
    )


def test_several_runs_and_a_bad_tracker_are_refused(tmp_path, weights, capsys):
    for day in ("2024-03-01", "2024-03-02"):
        as_run(tmp_path / "all" / f"{day}_ckpt", weights, name="iter_0000007", tracker="x")
    assert "holds 2 runs: 2024-03-01_ckpt, 2024-03-02_ckpt; name one" in refused(
        capsys, tmp_path / "all", tmp_path / "out"
    )
    assert "holds 'x' and not an iteration" in refused(
        capsys, tmp_path / "all/2024-03-01_ckpt", tmp_path / "out"
    )
    assert registry.read(tmp_path / "all/2024-03-01_ckpt", iteration=7).iteration == 7


def test_a_model_of_another_family_is_refused(trained, tmp_path, capsys):
    run = trained(
        tp=2,
        pp=2,
        layers=2,
        hidden=64,
        heads=4,
        dtype="bf16",
        rmsnorm=True,
        swiglu=True,
        rope=True,
        no_bias=True,
    )
    assert "no architecture in common" in refused(
        capsys, run.path, tmp_path / "out", "--weights-only"
    )


def test_an_optimizer_that_cannot_be_read_is_told(tmp_path, weights, capsys):
    run = as_run(
        tmp_path / "run",
        weights,
        config=SAID,
        optimizer={"cur_scale": 1.0, "optimizer_state_dict": {}, "fp32_groups": [[torch.ones(3)]]},
    )
    convert(run, tmp_path / "out", *WHOLE, "--scheme", "plain")
    said = f"{run}/iter_0000000_all_dp: its optimizer's state is of a kind that cannot be read; the weights go alone"
    assert registry.read(run).notes == [said]
    assert registry.read(DATA / "stock_hf_to_tp2pp2").notes == []


def test_the_rank_folders_of_megatron_are_not_meraks(tmp_path):
    (tmp_path / "iter_0000007/mp_rank_00").mkdir(parents=True)
    (tmp_path / "iter_0000007/mp_rank_00/model_optim_rng.pt").write_bytes(b"")
    assert not files.recognizes(tmp_path) and not files.recognizes(tmp_path / "iter_0000007")
    assert files.recognizes(DATA / "zero_tp1pp1dp3")
