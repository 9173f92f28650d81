"""Checkpoints written by Megatron-LM's own training script, converted, loaded by MindSpore itself,
compared bit for bit.

The truth is taken without any of our code: distrib_optim.pt is loaded by torch and sliced by the
index map that the live buffers held while training (truth/rank*.json)."""

import json

import numpy as np
import pytest
import torch

from examples.mindspore_proof import mindspore_name as core_name
from parammap.cli.main import main
from tests.support import paths
from tests.support.goldens import GOLDENS, buckets_of, mindspore_name, truth
from tests.support.mindspore_load import load
from tests.support.prototype_map import translated
from tests.support.torch_load import torch_load

DATA = paths.TESTS / "data" / "megatron"


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
@pytest.mark.parametrize("name", GOLDENS)
def test_golden_converts_exactly(name, form, tmp_path):
    layers, number = GOLDENS[name]
    out = tmp_path / "out"
    assert main(["convert", str(DATA / name), str(out), "--to", "mindspore", "--format", form]) == 0
    expected = truth(DATA / name, layers)
    ranks = sorted(expected)
    loaded = load(
        [out / f"rank_{number(*rank)}" / f"network.{form}" for rank in ranks], tmp_path / "loaded"
    )
    assert len(list(out.glob("rank_*"))) == len(ranks)
    for rank, arrays in zip(ranks, loaded, strict=True):
        states = {key for key in arrays if key.startswith(("language_model.", "exp_avg"))}
        assert states == set(expected[rank])
        for key, value in expected[rank].items():
            assert value.dtype == arrays[key].dtype and np.array_equal(
                value.view(np.uint32), arrays[key].view(np.uint32)
            ), key


def test_scalars_have_the_types_that_the_loader_assigns(tmp_path):
    golden = DATA / "cac60ce4_patched_legacy_tp2pp2"
    assert main(["convert", str(golden), str(tmp_path / "out"), "--to", "mindspore"]) == 0
    (arrays,) = load([tmp_path / "out/rank_0/network.ckpt"], tmp_path / "loaded")
    saved = torch_load(golden / "iter_0000002/mp_rank_00_000/model_optim_rng.pt")
    groups = saved["optimizer"]["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}
    scalars = {k: v for k, v in arrays.items() if not k.startswith(("language_model.", "exp_avg"))}
    expected = {
        "state_step": np.array([2], np.float32),
        "learning_rate_group_0": np.float64(0.008272727272727274),
        "weight_decay_group_0": np.float64(groups[0]["weight_decay"]),
        "weight_decay_group_1": np.float64(groups[1]["weight_decay"]),
        "max_lr": np.float64(0.01),
        "min_lr": np.float64(0.001),
        "lr_warmup_steps": np.int64(0),
        "num_steps": np.int64(16),
        "lr_decay_steps": np.int64(80),
        "lr_decay_style": np.int64(2),
        "wd_incr_style": np.int64(0),
        "step_num": np.int64(2),
        "epoch_num": np.int64(0),
    }
    for name, value in expected.items():
        assert scalars[name].dtype == value.dtype and scalars[name].shape == value.shape, name
        assert scalars[name] == value, name
    manifest = json.loads((tmp_path / "out/parammap_manifest.json").read_text())
    assert set(manifest["scalars_left_out"]) == {
        "lr_warmup_steps",
        "betas_group_0",
        "betas_group_1",
    }


def test_moe_golden_is_refused_with_the_missing_names(tmp_path, capsys):
    golden = DATA / "cac60ce4_patched_mcore_moe_ep2dp2"
    assert main(["convert", str(golden), str(tmp_path / "out"), "--to", "mindspore"]) == 2
    error = capsys.readouterr().err
    assert "experts.local_experts" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_moe_golden_converts_without_its_experts_on_demand(tmp_path):
    golden = DATA / "cac60ce4_patched_mcore_moe_ep2dp2"
    assert (
        main(
            [
                "convert",
                str(golden),
                str(tmp_path / "out"),
                "--to",
                "mindspore",
                "--drop",
                "experts",
            ]
        )
        == 0
    )
    live = json.loads((golden / "truth/rank0.json").read_text())["chunks"]
    saved = torch.load(golden / "iter_0000002/mp_rank_00_000/distrib_optim.pt", weights_only=True)
    (dense,) = saved[0][0].values()
    ranks = load([tmp_path / f"out/rank_{n}/network.ckpt" for n in (0, 1)], tmp_path / "loaded")
    (buffer,) = (b for b in live if b["kind"] == "dense")
    table = {
        "self_attention.linear_qkv.weight": "attention.qkv_proj.weight",
        "mlp.router.weight": "mlp.router.gating.weight",
        "pre_mlp_layernorm.weight": "post_attention_norm.gamma",
        "self_attention.linear_proj.bias": "attention.out_proj.bias",
    }
    compared = 0
    for name, shape, start, end, _ in buffer["params"]:
        layer, _, tail = name.removeprefix("module.").removeprefix("decoder.layers.").partition(".")
        if tail in table:
            for role, prefix in (("param", ""), ("exp_avg_sq", "exp_avg_sq.")):
                value = buckets_of(dense, role)[start:end].reshape(shape)
                for arrays in ranks:
                    assert np.array_equal(
                        value,
                        arrays[f"{prefix}language_model.encoder.layers.{layer}.{table[tail]}"],
                    )
                    compared += 1
    assert compared == 4 * 4 * 2 * 2
    assert not any("experts" in key for arrays in ranks for key in arrays)


def test_weights_only_keeps_the_dtype_on_disk_or_casts(tmp_path):
    golden = DATA / "cac60ce4_mcore_pp2dp2_llama"
    for form in ("ckpt", "safetensors"):
        assert (
            main(
                [
                    "convert",
                    str(golden),
                    str(tmp_path / form),
                    "--to",
                    "mindspore",
                    "--weights-only",
                    "--format",
                    form,
                ]
            )
            == 0
        )
    assert (
        main(
            [
                "convert",
                str(golden),
                str(tmp_path / "cast"),
                "--to",
                "mindspore",
                "--weights-only",
                "--dtype",
                "float32",
            ]
        )
        == 0
    )
    model = torch_load(golden / "iter_0000002/mp_rank_00_000/model_optim_rng.pt")["model"]
    ckpt, safe, cast = load(
        [
            tmp_path / "ckpt/rank_0/network.ckpt",
            tmp_path / "safetensors/rank_0/network.safetensors",
            tmp_path / "cast/rank_0/network.ckpt",
        ],
        tmp_path / "loaded",
    )
    pairs = {
        "decoder.layers.1.mlp.linear_fc1.weight": "language_model.encoder.layers.1.mlp.mapping.weight",
        "decoder.layers.0.input_layernorm.weight": "language_model.encoder.layers.0.input_norm.gamma",
        "decoder.layers.0.self_attention.linear_qkv.weight": "language_model.encoder.layers.0.attention.qkv_proj.weight",
    }
    for source, name in pairs.items():
        bits = model[source].view(torch.uint16).numpy()
        assert np.array_equal(bits, ckpt["bf16:" + name]) and np.array_equal(
            bits, safe["bf16:" + name]
        )
        assert np.array_equal(model[source].float().numpy(), cast[name])
    weights = sum(isinstance(value, torch.Tensor) for value in model.values())
    assert (
        weights
        == sum(key.startswith("bf16:") for key in ckpt)
        == sum(key.startswith("bf16:") for key in safe)
    )


def test_pt_meta_restores_what_the_way_back_needs(tmp_path):
    golden = DATA / "cac60ce4_patched_legacy_tp2pp2"
    assert main(["convert", str(golden), str(tmp_path / "out"), "--to", "mindspore"]) == 0
    ours = torch_load(tmp_path / "out/pt_meta/args_tp01_pp001.pt")
    theirs = torch_load(golden / "iter_0000002/mp_rank_01_001/model_optim_rng.pt")
    assert vars(ours["args"]) == vars(theirs["args"]) and len(vars(ours["args"])) > 200
    for key in (
        "checkpoint_version",
        "iteration",
        "optimizer",
        "opt_param_scheduler",
        "num_floating_point_operations_so_far",
    ):
        assert ours[key] == theirs[key]
    for key, value in theirs["rng_state"][0].items():
        assert repr(ours["rng_state"][0][key]) == repr(value)
    assert torch.equal(
        ours["rng_state"][0]["torch_rng_state"], theirs["rng_state"][0]["torch_rng_state"]
    )


@pytest.mark.parametrize(
    "name", ["core_r0.8.0_repo_legacy_tp2pp2_hook", "core_r0.12.0_repo_mcore_tp2pp2_hook"]
)
def test_coalesced_buckets_of_the_real_script_convert_exactly(name, tmp_path):
    """Each weight is, rounded to bfloat16, the model's own; each moment is torch's slice of the
    unpadded buckets."""
    source = translated(DATA / name, tmp_path / "src")
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "mindspore"]) == 0
    ranks = [(tp, pp) for tp in range(2) for pp in range(2)]
    files = [tmp_path / f"out/rank_{2 * pp + tp}/network.ckpt" for tp, pp in ranks]
    for (tp, pp), arrays in zip(ranks, load(files, tmp_path / "loaded"), strict=True):
        folder = DATA / name / "iter_0000002" / f"mp_rank_{tp:02d}_{pp:03d}"
        saved = torch.load(folder / "distrib_optim.pt", weights_only=True)
        model = dict(flatten(torch_load(folder / "model_optim_rng.pt")["model"]))
        (buffers,) = json.loads((folder / "param_map.json").read_text())["optimizers"]
        per_stage = torch_load(folder / "model_optim_rng.pt")["args"].num_layers // 2
        compared = 0
        for gbuf, live in enumerate(buffers):
            (states,) = saved[gbuf].values()
            before = np.cumsum([0, *live["numel_unpadded"]])
            for param in live["params"]:
                low = (
                    param["start"]
                    - live["bucket_indices"][param["bucket"]][0]
                    + before[param["bucket"]]
                )
                target = named(
                    param["name"], [per_stage * pp + local for local in range(per_stage)]
                )
                for state, prefix in (
                    ("param", ""),
                    ("exp_avg", "exp_avg."),
                    ("exp_avg_sq", "exp_avg_sq."),
                ):
                    flat = states[state][low : low + param["end"] - param["start"]].reshape(
                        param["shape"]
                    )
                    assert np.array_equal(
                        flat.numpy().view(np.uint32), arrays[prefix + target].view(np.uint32)
                    ), target
                    compared += 1
                key = (
                    "word_embeddings_for_head.weight"
                    if param["name"] == "word_embeddings.weight"
                    else param["name"]
                )
                assert torch.equal(torch.from_numpy(arrays[target]).bfloat16(), model[key])
        assert (
            compared == sum(name.startswith(("language_model.", "exp_avg")) for name in arrays) > 0
        )


def named(name: str, layers: list[int]) -> str:
    if name.startswith(("language_model.", "word_embeddings")):
        return mindspore_name(name, layers, layer_norm=True)
    return core_name(name, layers, layer_norm=True)


def flatten(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield prefix + key, value
