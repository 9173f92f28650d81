"""The training state that readers fill in: of real checkpoints, against torch.load of their files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.training_state import ParamGroup, TrainingState, together
from parammap.cli.main import main
from parammap.errors import RefusedError
from parammap.formats import torch_zip
from parammap.frameworks import registry
from parammap.frameworks.megatron.training_state import training_states
from tests.support import deepspeed_goldens, paths
from tests.support.torch_load import torch_load

DATA = paths.TESTS / "data"
MEGATRON = DATA / "megatron/cac60ce4_patched_legacy_tp2pp2"
_RANK = (0, 0, 0)


def values(groups: tuple[ParamGroup, ...]) -> list[dict]:
    return [dict(group.values) for group in groups]


def saved_groups(optimizer: dict) -> list[dict]:
    return [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer["param_groups"]
    ]


def without_random_states(checkpoint: Checkpoint) -> dict:
    return {
        rank: replace(state, random_state=None)
        for rank, state in checkpoint.training_states.items()
    }


def test_megatron_lm():
    checkpoint = registry.read(MEGATRON)
    assert len(checkpoint.training_states) == 4
    for (tp, pp, _), state in checkpoint.training_states.items():
        path = MEGATRON / f"iter_0000002/mp_rank_{tp:02}_{pp:03}/model_optim_rng.pt"
        saved = torch_load(path)
        args = saved["args"]
        assert values(state.groups) == saved_groups(saved["optimizer"]["optimizer"])
        assert dict(state.schedule.values) == saved["opt_param_scheduler"]
        assert (state.iteration, state.steps) == (saved["iteration"], (2,))
        assert state.consumed_samples == args.consumed_train_samples
        assert state.consumed_tokens == args.consumed_train_samples * args.seq_length
        assert (state.compute_dtype, state.loss_scale) == ("bfloat16", None)
        assert (
            state.random_state[0]["random_rng_state"] == saved["rng_state"][0]["random_rng_state"]
        )
    group = checkpoint.training_state.groups[0]
    assert (group.betas, group.eps, group.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
    assert (group.lr, group.step, group.bias_correction) == (group.values["lr"], 2, True)


@pytest.mark.parametrize("to", ["mindspore", "megatron"])
def test_what_is_written_for_a_framework_of_megatrons_kind_is_the_same(tmp_path, to):
    assert main(["convert", str(MEGATRON), str(tmp_path / "out"), "--to", to]) == 0
    before, after = map(registry.read, (MEGATRON, tmp_path / "out"))
    assert without_random_states(after) == without_random_states(before)


def test_torch_dist(tmp_path):
    assert main(["convert", str(MEGATRON), str(tmp_path / "out"), "--to", "megatron-dist"]) == 0
    common = torch_load(tmp_path / "out/iter_0000002/common.pt")
    state = registry.read(tmp_path / "out").training_state
    assert values(state.groups) == saved_groups(common["optimizer"]["optimizer"])
    assert dict(state.schedule.values) == common["opt_param_scheduler"]
    assert (state.iteration, state.steps, state.consumed_samples) == (2, (2,), 16)


def test_deepspeed(tmp_path):
    """In float16: the loss is scaled, and steps are kept with each parameter."""
    folder = deepspeed_goldens.unpack("mds_bloom_pp2tp2dp1_fp16", tmp_path)
    state = registry.read(folder).training_state
    scaler = deepspeed_goldens.load(
        folder / "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    )["optimizer_state_dict"]["loss_scaler"]
    assert (state.compute_dtype, state.loss_scale) == ("float16", scaler.__dict__["cur_scale"])
    assert (state.iteration, state.steps, state.consumed_samples) == (3, (3,), 6)
    assert [group.weight_decay for group in state.groups] == [0.1, 0.0]


def test_deepspeed_does_not_scale_the_loss_in_bfloat16(tmp_path):
    folder = deepspeed_goldens.unpack("mds_gpt_pp2tp2dp2_bf16", tmp_path)
    state = registry.read(folder).training_state
    assert (state.compute_dtype, state.loss_scale) == ("bfloat16", None)


def test_metaseq():
    checkpoint = registry.read(DATA / "metaseq/mp2dp2_fp16")
    saved = next(iter(checkpoint.rank_metadata.values()))["last_optimizer_state"]
    state = checkpoint.training_state
    assert values(state.groups) == saved_groups(saved)
    assert (state.iteration, state.steps, state.loss_scale) == (3, (3,), 4)
    assert state.optimizer == "MemoryEfficientFP16Optimizer"


def test_weights_alone_have_none():
    checkpoint = registry.read(DATA / "transformers/llama_hf")
    assert checkpoint.training_state == TrainingState() and checkpoint.steps_taken() == 0


def test_the_loss_scale_of_megatron_lm(tmp_path):
    """As core/optimizer/grad_scaler.py's DynamicGradScaler saves it (core_r0.6.0 … main)."""
    scaler = {"scale": torch.tensor([4096.0]), "growth_tracker": 3, "hysteresis_tracker": 2}
    torch.save({"grad_scaler": scaler, "optimizer": {"param_groups": []}}, tmp_path / "saved.pt")
    optimizer = torch_zip.read(tmp_path / "saved.pt")
    for saved in (optimizer, [optimizer, optimizer]):
        assert training_states({_RANK: {"optimizer": saved}})[_RANK].loss_scale == 4096.0


def test_ranks_together_have_the_groups_and_the_steps_of_all():
    decayed, other = ParamGroup({"weight_decay": 0.1}), ParamGroup({"weight_decay": 0.0})
    states = [
        TrainingState(iteration=7, groups=(decayed,), steps=(2,)),
        TrainingState(iteration=7, groups=(decayed, other), steps=(3,)),
    ]
    assert together(states) == TrainingState(iteration=7, groups=(decayed, other), steps=(2, 3))


def test_steps_that_differ_are_refused():
    checkpoint = registry.read(MEGATRON, weights_only=True)
    state = checkpoint.training_states[1, 1, 0]
    checkpoint.training_states[1, 1, 0] = replace(state, steps=(5,))
    with pytest.raises(RefusedError, match=r"different numbers of steps \[2, 5\]"):
        checkpoint.steps_taken()


def test_metadata_of_a_framework_stays_with_it():
    """Whoever is no reader or writer of a framework takes the training state."""
    package = paths.ROOT / "parammap"
    others = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.parts[len(package.parts)] != "frameworks" and "rank_metadata" in path.read_text()
    }
    assert others == {"checkpoint/checkpoint.py"}
    first = re.compile(r"next\(\s*iter\(\s*\w+\.rank_metadata")
    assert not [
        path
        for path in Path(package / "frameworks").rglob("*.py")
        if first.search(path.read_text())
    ]
