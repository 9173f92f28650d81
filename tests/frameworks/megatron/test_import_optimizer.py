"""DeepSpeed's optimizers as Megatron-LM's: what megatron-core itself loads is the source's state to
the last bit, and it goes on training; there and back nothing changes; what Megatron-LM's optimizer
cannot be is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from examples.tiny.trained import Trained, train_into
from parammap.cli.main import main
from parammap.frameworks import registry
from parammap.frameworks.megatron.facts import args_of
from parammap.frameworks.megatron.training_state import param_groups
from tests.support import deepspeed_goldens
from tests.support.conversions import convert, digests
from tests.support.dist_checkpointing import assert_same_arrays, resume
from tests.support.reshards import RUNS

#: the golden's model; no bucket closes, as without --overlap-grad-reduce
MODEL = {
    "core": "0.16.1",
    "plain": True,
    "layers": 4,
    "hidden": 24,
    "heads": 4,
    "vocab": 50,
    "seq": 16,
    "tp": 2,
    "pp": 2,
    "dp": 2,
    "bucket": 10**9,
}
#: as BigScience's AnnealingLR saves it; Megatron-LM compares all but num_steps with the run's own
SCHEDULE = {
    "max_lr": 0.01,
    "warmup_steps": 0,
    "num_steps": 12,
    "warmup_tokens": 0,
    "num_tokens": 0,
    "decay_style": "linear",
    "decay_steps": 80,
    "min_lr": 0.001,
}
TORCH = ("--tp", "2", "--pp", "2", "--make-vocab-size-divisible-by", "16")
FIRST = ("--replicas", "first")


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    """A trained pipeline with a schedule; to be read only."""
    folder = deepspeed_goldens.unpack(deepspeed_goldens.GPT, tmp_path_factory.mktemp("golden"))
    for path in folder.rglob("mp_rank_*_model_states.pt"):
        deepspeed_goldens.change(path, lambda content: content.update(lr_scheduler=SCHEDULE))
    return folder


def with_generators(checkpoint: Path, other: Trained) -> Path:
    """The checkpoint with another run's random states, as the tiny run asks for some."""
    for path in checkpoint.glob("iter_*/*/model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        states = torch.load(
            other.iteration_folder / path.parent.name / path.name, weights_only=False
        )["rng_state"]
        torch.save({**content, "rng_state": states}, path)
    return checkpoint


def test_megatron_core_loads_the_state_and_trains_on(golden, trained, tmp_path):
    before = digests(golden)
    one = convert(golden, tmp_path / "dist", "megatron-dist", *FIRST)
    two = convert(
        golden, tmp_path / "torch", "megatron", *TORCH, *FIRST, "--transformer-impl", "local"
    )
    assert digests(one) == digests(two) == before and {role for role, _ in before} == {
        "weight",
        "exp_avg",
        "exp_avg_sq",
    }
    same = resume(one, tmp_path / "same", **MODEL, steps=3)
    assert digests(same) == before
    with_generators(two, trained(**RUNS["tied"]))
    gone_on = train_into(tmp_path / "on", {**MODEL, "resume": str(two), "steps": 4})
    assert_same_arrays(same / "resumed", gone_on.path / "resumed")
    for truth in gone_on.truths():
        assert [group["step"] for group in truth.meta["param_groups"]] == [4, 4]
        assert truth.meta["scheduler"]["num_steps"] == 12 + 8
        loaded = np.load(gone_on.path / "resumed" / truth.file.name)
        chunk, name = next(truth.names())
        for role in ("main", "exp_avg", "exp_avg_sq"):
            assert (truth.array(chunk, name, role) != loaded[f"{chunk}/{name}/{role}"]).any()


@pytest.mark.parametrize("is_universal", [False, True])
def test_what_stands_beside_the_state(golden, tmp_path, is_universal):
    source = (
        convert(golden, tmp_path / "universal", "deepspeed", *FIRST) if is_universal else golden
    )
    assert registry.read(source).training_state.steps == (3,)
    out = convert(source, tmp_path / "dist", "megatron-dist", *FIRST)
    common = torch.load(out / "iter_0000003/common.pt", weights_only=False)
    own = {
        "is_expert_parallel": False,
        "default_config": True,
        "lr_mult": 1.0,
        "is_decoupled_lr": False,
        "max_lr": 0.01,
        "min_lr": 0.001,
        "bias_correction": True,
        "lr": 0.01,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "step": 3,
    }
    assert common["optimizer"]["optimizer"]["param_groups"] == [
        {**own, "wd_mult": 1.0, "weight_decay": 0.1},
        {**own, "wd_mult": 0.0, "weight_decay": 0.0},
    ]
    assert common["opt_param_scheduler"] == {
        "max_lr": 0.01,
        "min_lr": 0.001,
        "num_steps": 12,
        "lr_warmup_steps": 0,
        "lr_decay_steps": 80,
        "lr_decay_style": "linear",
    }
    said = vars(common["args"])
    assert (said["iteration"], said["consumed_train_samples"], said["consumed_valid_samples"]) == (
        3,
        12,
        0,
    )
    assert (said["params_dtype"], said["bf16"], said["use_distributed_optimizer"]) == (
        torch.bfloat16,
        True,
        True,
    )


@pytest.mark.parametrize(
    ("to", "flags"),
    [("megatron-dist", ()), ("megatron", ("--tp", "4")), ("mindspore", ("--pp", "2"))],
)
def test_through_deepspeed_nothing_changes(trained, tmp_path, to, flags):
    """Of a trained run of Megatron: digests, groups, counts, the dtype that is computed in."""
    run = trained(**RUNS["tied"])
    universal = convert(run.path, tmp_path / "universal", "deepspeed")
    back = convert(universal, tmp_path / "back", to, *flags)
    assert digests(back) == digests(run.path)
    before, after = (registry.read(folder).common_metadata for folder in (run.path, back))
    assert param_groups(after["optimizer"]) == param_groups(before["optimizer"])
    assert after["opt_param_scheduler"].items() <= before["opt_param_scheduler"].items()
    assert len(after["opt_param_scheduler"]) == len(SCHEDULE) - 2
    counts = (
        "iteration",
        "consumed_train_samples",
        "bf16",
        "params_dtype",
        "num_layers",
        "hidden_size",
    )
    assert [args_of(after)[name] for name in counts] == [args_of(before)[name] for name in counts]


def test_without_a_schedule_the_rate_stays(tmp_path, capsys):
    """A schedule that decays by tokens is none of Megatron-LM's either."""
    folder = deepspeed_goldens.unpack(deepspeed_goldens.GPT, tmp_path / "golden")
    for said in ("it was not saved", "it decays by tokens"):
        out = convert(folder, tmp_path / said, "megatron-dist", *FIRST)
        assert (
            "it is written as constant; --override-opt_param-scheduler" in capsys.readouterr().out
        )
        common = torch.load(out / "iter_0000003/common.pt", weights_only=False)
        assert common["opt_param_scheduler"] == {
            "max_lr": 0.01,
            "min_lr": 0.01,
            "lr_warmup_steps": 0,
            "lr_decay_steps": 12,
            "lr_decay_style": "constant",
            "num_steps": 12,
        }
        assert "max_lr" not in common["optimizer"]["optimizer"]["param_groups"][0]
        for path in folder.rglob("mp_rank_*_model_states.pt"):
            deepspeed_goldens.change(path, decay_by_tokens)


def decay_by_tokens(content: dict) -> None:
    content["lr_scheduler"] = SCHEDULE
    content["args"].lr_decay_tokens = 10**6


REFUSED = {
    "rates": ({"lr": 0.5}, "its parameter groups have different lr"),
    "decays": ({"weight_decay": 0.3}, "its parameter groups have different weight_decay"),
    "betas": ({"betas": None}, "keeps no lr, betas, eps of its optimizer's param_groups"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_groups_that_megatron_lm_cannot_have_are_refused(tmp_path, capsys, case):
    changes, message = REFUSED[case]
    folder = deepspeed_goldens.unpack(deepspeed_goldens.GPT, tmp_path / "golden")

    def change(content: dict) -> None:
        group = content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][1]
        group.update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del group[key]

    for path in folder.rglob("*_optim_states.pt"):
        deepspeed_goldens.change(path, change)
    assert (
        main(["convert", str(folder), str(tmp_path / "out"), "--to", "megatron-dist", *FIRST]) == 2
    )
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error and not (tmp_path / "out").exists()


def test_parameters_without_moments_are_refused(trained, tmp_path, capsys):
    universal = convert(trained(**RUNS["tied"]).path, tmp_path / "universal", "deepspeed")
    for name in ("exp_avg", "exp_avg_sq"):
        next(universal.glob(f"*/zero/4.mlp.dense_h_to_4h.weight/{name}.pt")).unlink()
    assert main(["convert", str(universal), str(tmp_path / "out"), "--to", "megatron"]) == 2
    assert (
        "1 parameters have no exp_avg, and Megatron-LM's optimizer steps all: "
        "layers.1.mlp.fc1.weight; convert " in (capsys.readouterr().err)
    )
    assert convert(universal, tmp_path / "out", "megatron", "--weights-only")
