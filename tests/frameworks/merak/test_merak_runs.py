"""Checkpoints of Merak's runtime: files that its own ZeRO-1, ties and parameter groups made, in
every path scheme."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from parammap.formats import torch_legacy
from parammap.frameworks import registry
from tests.support import paths
from tests.support.merak import (
    DATA,
    HF,
    SAID,
    TRACKER,
    WHOLE,
    as_run,
    assert_same,
    convert,
    digests,
    load,
    models,
    refused,
)
from tests.support.views import matrix_of

CHECKOUT = os.environ.get("MERAK")


@pytest.fixture(scope="module")
def weights():
    return load(HF / "pytorch_model.bin")


RUNS = ["zero_tp1pp1dp3", "zero_tp2pp2dp2", "adamw_tp2pp1", "adamw_tp1pp3"]
_OWN = {
    "ln_1": "input_norm",
    "ln_2": "post_attention_norm",
    "attn.c_proj": "attention.out",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE = {
    "transformer.wte.weight": "embedding.word.weight",
    "transformer.wpe.weight": "embedding.position.weight",
}


def atoms(name, value):
    """The logical tensors, [out, in], of transformers' tensor."""
    if "ln_f" in name or ".h." not in name:
        yield _OUTSIDE.get(name, name.replace("transformer.ln_f", "final_norm")), value
        return
    _, _, layer, rest = name.split(".", 3)
    path, kind = rest.rsplit(".", 1)
    value = value.T if value.dim() == 2 else value
    if path == "attn.c_attn":
        for atom, part in zip("qkv", value.chunk(3), strict=True):
            yield f"layers.{layer}.attention.{atom}.{kind}", part
    else:
        yield f"layers.{layer}.{_OWN[path]}.{kind}", value


def copies(checkpoint, role, name):
    """Each rank's copy of a logical tensor, put together from its shards."""
    (tensor,) = (one for one in checkpoint.index.shards if (one.state, one.name) == (role, name))
    regions = checkpoint.index.shards[tensor]
    for number in range(max(map(len, regions.values()))):
        yield matrix_of(tensor, regions, number).view(tensor.dtype).reshape(tensor.shape)


def assert_truth(folder, roles):
    checkpoint, truth = registry.read(folder), load(folder / "truth.pt")
    assert {tensor.state for tensor in checkpoint.index.shards} == set(roles)
    compared = set()
    for role in roles:
        for name, value in truth[role].items():
            for own, expected in atoms(name, value):
                for copy in copies(checkpoint, role, own):
                    assert np.array_equal(copy, expected.numpy()), (role, own)
                compared.add((role, own))
    assert compared == {(tensor.state, tensor.name) for tensor in checkpoint.index.shards}
    return checkpoint


@pytest.mark.parametrize("run", RUNS)
def test_a_runs_states_are_those_of_its_optimizer(run):
    """Files that Merak's own code made (tests/support/merak_run.py), in torch's older format, hold
    the states of a plain AdamW over the whole model; tied_modules is the first key of the first and
    of the last stage."""
    roles = ("weight", "exp_avg", "exp_avg_sq") + (("model_weight",) if "zero" in run else ())
    checkpoint = assert_truth(DATA / run, roles)
    state = checkpoint.training_state
    assert (checkpoint.iteration, state.iteration, state.steps) == (5, 5, (3,))
    assert [group.weight_decay for group in state.groups] == [0.1, 0.0]
    first = torch_legacy.read(min((DATA / run).rglob("*model_optim.pt")))["model"]
    assert next(iter(first)).startswith("module.tied_modules.torch_Size([")


@pytest.mark.parametrize("run", RUNS)
def test_a_runs_weights_go_anywhere(run, tmp_path, capsys):
    """To other degrees and back: the digests of the weights stay; the optimizer stays behind and is
    named."""
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "model_type": "gpt2",
                "n_head": 2,
                "activation_function": "gelu_new",
                "layer_norm_epsilon": 1e-5,
            }
        )
    )
    there = convert(
        DATA / run,
        tmp_path / "there",
        "--tp",
        "2",
        "--pp",
        "3",
        "--config",
        str(config),
        "--folder",
        "iter",
    )
    assert (there / TRACKER).read_text() == "5" and (
        there / "iter_0000005/mp_rank_01_pp_rank_002"
    ).is_dir()
    back = convert(there, tmp_path / "back", *WHOLE, "--scheme", "plain", "--folder", "iter")
    found = {key: value for key, value in digests(capsys, DATA / run).items() if key[0] == "weight"}
    assert digests(capsys, there) == digests(capsys, back) == found
    dropped = json.loads((there / "parammap_manifest.json").read_text())["dropped"]
    assert "layers.0.attention.q.weight (exp_avg)" in dropped


def test_words_that_no_rank_shares_are_read_and_written(tmp_path, capsys):
    """Without --parallel_vocab each tensor-parallel rank holds the whole table."""
    run = DATA / "adamw_tp2pp1"
    for path in run.rglob("*model_optim.pt"):
        assert torch_legacy.read(path)["model"]["module.0.transformer.wte.weight"].shape == (20, 8)
    out = convert(HF, tmp_path / "out", "--tp", "4", "--pp", "1", "--no-parallel-vocab")
    whole = load(HF / "pytorch_model.bin")["transformer.wte.weight"]
    for model in models(out).values():
        assert torch.equal(model["module.0.transformer.wte.weight"], whole)
        assert torch.equal(model["module.6.lm_head.weight"], whole)
    assert digests(capsys, out) == digests(capsys, HF)
    assert not [
        tensor.name
        for tensor in registry.read(out).index.shards
        if tensor.name.endswith(".padding")
    ]


def test_tensors_that_lie_in_wider_ones(tmp_path, weights, capsys):
    """The columns of a matrix, and the transpose of one, as a user's own script may have saved
    them."""

    def view(name, tensor):
        if not name.endswith(".weight") or tensor.dim() != 2:
            return tensor
        wide = torch.cat([torch.full_like(tensor, 7), tensor, torch.full_like(tensor, 9)], dim=1)
        return (
            wide[:, tensor.shape[1] : -tensor.shape[1]]
            if ".h.1." in name
            else tensor.t().contiguous().t()
        )

    own = {name: view(name, tensor) for name, tensor in weights.items()}
    run = as_run(tmp_path / "run", own, config=SAID)
    assert not own["transformer.h.1.attn.c_attn.weight"].is_contiguous() and digests(
        capsys, run
    ) == digests(capsys, HF)
    out = convert(run, tmp_path / "out", "--tp", "2", "--pp", "2")
    assert_same(out, DATA / "stock_hf_to_tp2pp2")


def test_a_tie_that_was_cloned_is_compared(tmp_path, weights, capsys):
    words = weights["transformer.wte.weight"]
    for delta in (0, 1):
        root = as_run(tmp_path / f"run{delta}", weights, config=SAID)
        path = root / "iter_0000000_all_dp/model_optim.pt"
        content = load(path)
        content["model"] = {
            "module.tied_modules.torch_Size([98, 32]).weight": words + delta,
            **content["model"],
        }
        torch.save(content, path)
    convert(tmp_path / "run0", tmp_path / "out0", "--tp", "2", "--pp", "2")
    said = refused(capsys, tmp_path / "run1", tmp_path / "out1", "--tp", "2", "--pp", "2")
    assert "ranks keep different copies of 1 tensors" in said
    assert "embedding.word.weight (weight): 3136 elements differ" in said


def test_an_untied_head_stays_one(tmp_path, weights):
    config = {**SAID, "tie_word_embeddings": False}
    own = {**weights, "lm_head.weight": weights["lm_head.weight"] * 2}
    out = convert(
        as_run(tmp_path / "run", own, config=config), tmp_path / "out", "--tp", "2", "--pp", "2"
    )
    stage = [
        load(out / f"release/mp_rank_0{tp}_pp_rank_001/partial_model_optim.pt")["model"]
        for tp in range(2)
    ]
    assert torch.equal(
        torch.cat([one["module.6.lm_head.weight"] for one in stage]), own["lm_head.weight"]
    )
    assert json.loads((out / "release/config.json").read_text())["tie_word_embeddings"] is False


SCHEMES = {  # the folder, the tracker, what SRC is
    "d72efe5": ("iter_0000007_all_dp", "7", "."),
    "HEAD": ("iter_0000007", "7", "."),
    "release": ("release", "release", "."),
    "release at tp 1 · pp 1": ("iter_0000000_all_dp", "release", "."),
    "the folder": ("iter_0000007_all_dp", "9", "iter_0000007_all_dp"),
    "a dated run": ("2024-03-01_ckpt/iter_0000007", None, "."),
    "the best": ("best_ckpt/best_model", None, "best_ckpt"),
}


@pytest.mark.parametrize("case", SCHEMES)
def test_every_path_scheme(case, tmp_path, weights, capsys):
    name, tracker, source = SCHEMES[case]
    as_run(tmp_path, weights, name=name, tracker=tracker or "", legacy=case != "HEAD", iteration=7)
    if tracker is None:
        (tmp_path / TRACKER).rename((tmp_path / name).parent / TRACKER)
        ((tmp_path / name).parent / TRACKER).write_text("7")
    found = registry.read(tmp_path / source)
    assert found.framework == "merak" and found.folder == tmp_path / name
    assert found.iteration == 7
    assert digests(capsys, tmp_path / source) == digests(capsys, HF)


@pytest.mark.skipif(not CHECKOUT, reason="needs a checkout of Merak d72efe5, as MERAK")
def test_merak_makes_the_runs_anew(tmp_path):
    """The very code that made tests/data/merak's runs, run now."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.merak_run", tmp_path],
        check=True,
        timeout=900,
        cwd=paths.ROOT,
    )
    for run in RUNS:
        assert_truth(
            tmp_path / run,
            ("weight", "exp_avg", "exp_avg_sq") + (("model_weight",) if "zero" in run else ()),
        )
