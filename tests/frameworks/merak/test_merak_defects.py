"""What Merak's own tools get wrong, each by its number in docs/merak.md, and right here."""

import json
import shutil
from argparse import Namespace

import pytest
import torch

from convert import convert_merak_gpt2_checkpoint
from parammap.errors import RefusedError
from parammap.frameworks import registry
from parammap.frameworks.merak.partition import CUSTOM, UNIFORM, UNIFORM_FLOOR, cuts
from parammap.frameworks.merak.target import padded_rows
from tests.support.merak import (
    CONFIG,
    DATA,
    HF,
    SAID,
    as_run,
    assert_same,
    convert,
    digests,
    load,
    models,
    refused,
)


@pytest.fixture(scope="module")
def weights():
    return load(HF / "pytorch_model.bin")


def test_d1_the_target_degrees_count_whatever_the_sources_are(tmp_path):
    out = convert(
        DATA / "stock_hf_to_tp1pp2",
        tmp_path / "out",
        "--tp",
        "2",
        "--pp",
        "2",
        "--config",
        str(CONFIG),
    )
    assert_same(out, DATA / "stock_hf_to_tp2pp2")


def test_d2_merak_to_merak_from_several_tensor_parallel_ranks(tmp_path):
    for source, tp, pp in (("stock_hf_to_tp2pp2", 2, 1), ("stock_hf_to_tp2pp1", 1, 2)):
        out = convert(
            DATA / source,
            tmp_path / source,
            "--tp",
            str(tp),
            "--pp",
            str(pp),
            "--config",
            str(CONFIG),
        )
        assert_same(out, DATA / f"stock_hf_to_tp{tp}pp{pp}")


def test_d3_transformers_from_several_tensor_parallel_ranks(tmp_path, weights):
    out = tmp_path / "out"
    assert (
        convert_merak_gpt2_checkpoint.main(
            [
                "--load_path",
                str(DATA / "stock_hf_to_tp2pp2/release"),
                "--save_path",
                str(out),
                "--json_path",
                str(CONFIG),
                "--convert_type",
                "transformers",
            ]
        )
        == 0
    )
    there = load(out / "pytorch_model.bin")
    assert there.keys() == weights.keys() and all(
        torch.equal(there[name], tensor) for name, tensor in weights.items()
    )


def test_d4_for_release_zeroes_the_counters(tmp_path, weights):
    args = Namespace(consumed_train_samples=18, consumed_valid_samples=3, seed=1)
    run = as_run(tmp_path / "run", weights, config=SAID, args=args)
    for flags, counters in (((), (18, 3)), (("--for-release",), (0, 0))):
        out = convert(run, tmp_path / f"out{len(flags)}", "--tp", "1", "--pp", "2", *flags)
        kept = load(out / "release/mp_rank_00_pp_rank_001/partial_model_optim.pt")["args"]
        assert (kept.consumed_train_samples, kept.consumed_valid_samples, kept.seed) == (
            *counters,
            1,
        )


def test_d5_a_single_rank_has_conv1d_and_its_names(tmp_path):
    out = convert(
        DATA / "stock_hf_to_tp2pp2",
        tmp_path / "out",
        "--tp",
        "1",
        "--pp",
        "2",
        "--config",
        str(CONFIG),
    )
    names = {name for model in models(out).values() for name in model}
    assert not [name for name in names if "_linear" in name]
    assert models(out)["release/mp_rank_00_pp_rank_000/partial_model_optim.pt"][
        "module.2.transformer.h.0.attn.c_attn.weight"
    ].shape == (32, 96)


def test_d6_what_is_written_says_all_that_later_steps_need(tmp_path, weights):
    args = Namespace(seed=1234)
    run = as_run(
        tmp_path / "run", weights, config=SAID, args=args, tracker="7", name="iter_0000007_all_dp"
    )
    out = convert(run, tmp_path / "1", "--tp", "2", "--pp", "2", "--folder", "iter")
    made = load(out / "iter_0000007/mp_rank_01_pp_rank_001/partial_model_optim.pt")
    assert (made["iteration"], made["checkpoint_version"], made["args"]) == (7, 3.0, args)
    convert(out, tmp_path / "2", "--format", "bin", to="transformers")


def test_d7_the_configuration_is_kept(tmp_path):
    there = convert(HF, tmp_path / "1", "--tp", "2", "--pp", "2")
    out = convert(there, tmp_path / "2", "--format", "bin", to="transformers")
    written = [
        json.loads((folder / "config.json").read_text()) for folder in (there / "release", out)
    ]
    for name in (
        "activation_function",
        "bos_token_id",
        "eos_token_id",
        "layer_norm_epsilon",
        "initializer_range",
        "vocab_size",
        "n_head",
        "n_inner",
        "resid_pdrop",
    ):
        assert [one[name] for one in written] == [SAID[name]] * 2, name


def test_d8_the_key_of_a_tie_is_no_layer(tmp_path):
    """tied_modules.* comes before all others in real runs of tied embeddings."""
    checkpoint = registry.read(DATA / "zero_tp2pp2dp2", weights_only=True)
    assert checkpoint.num_layers == 3 and not [
        one for one in checkpoint.index.held if "tied_modules" in one.found.name
    ]


def test_d9_what_a_degree_must_divide(tmp_path, capsys):
    said = refused(capsys, HF, tmp_path / "out", "--tp", "3", "--pp", "1")
    assert "--tp 3 does not divide its 4 attention heads" in said
    assert (
        convert(HF, tmp_path / "four", "--tp", "4", "--pp", "1") / "release/mp_rank_03"
    ).is_dir()
    odd = tmp_path / "odd"
    shutil.copytree(HF, odd)
    config = {**SAID, "n_inner": 126}
    (odd / "config.json").write_text(json.dumps(config))
    weights = load(odd / "pytorch_model.bin")
    for i in range(4):
        weights[f"transformer.h.{i}.mlp.c_fc.weight"] = torch.ones(32, 126)
        weights[f"transformer.h.{i}.mlp.c_fc.bias"] = torch.ones(126)
        weights[f"transformer.h.{i}.mlp.c_proj.weight"] = torch.ones(126, 32)
    torch.save(weights, odd / "pytorch_model.bin")
    said = refused(capsys, odd, tmp_path / "out", "--tp", "4", "--pp", "1")
    assert "--tp 4 does not divide its 126 columns of the MLP" in said


def test_d10_heads_are_never_guessed(tmp_path, capsys):
    said = refused(capsys, DATA / "stock_hf_to_tp1pp2", tmp_path / "out", "--tp", "2", "--pp", "2")
    assert (
        "does not record its heads, activation, eps; give a config.json of the model with --config"
        in said
    )


def test_d12_a_hundred_layers_and_more(tmp_path, capsys):
    shapes = {
        "ln_1.weight": (4,),
        "ln_1.bias": (4,),
        "attn.c_attn.weight": (4, 12),
        "attn.c_attn.bias": (12,),
        "attn.c_proj.weight": (4, 4),
        "attn.c_proj.bias": (4,),
        "ln_2.weight": (4,),
        "ln_2.bias": (4,),
        "mlp.c_fc.weight": (4, 8),
        "mlp.c_fc.bias": (8,),
        "mlp.c_proj.weight": (8, 4),
        "mlp.c_proj.bias": (4,),
    }
    weights = {
        "transformer.wte.weight": torch.randn(6, 4),
        "transformer.wpe.weight": torch.randn(5, 4),
        **{
            f"transformer.h.{i}.{name}": torch.randn(shape)
            for i in range(103)
            for name, shape in shapes.items()
        },
        "transformer.ln_f.weight": torch.randn(4),
        "transformer.ln_f.bias": torch.randn(4),
    }
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    config = {
        "model_type": "gpt2",
        "n_head": 2,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_layer": 103,
    }
    run = as_run(tmp_path / "run", weights, config=config)
    out = convert(run, tmp_path / "out", "--tp", "2", "--pp", "4")
    last = models(out)["release/mp_rank_01_pp_rank_003/partial_model_optim.pt"]
    assert (
        list(last)[-1] == "module.105.lm_head.weight"
        and "module.102.transformer.h.100.ln_1.weight" in last
    )
    assert digests(capsys, out) == digests(capsys, run)


def test_d13_arguments_of_any_class_are_read(tmp_path):
    """torch.load refuses them since 2.6, and needs their classes."""
    path = DATA / "adamw_tp1pp3/iter_0000005/mp_rank_00_pp_rank_000/partial_model_optim.pt"
    with pytest.raises(Exception, match="[Uu]nsupported|MerakArguments|weights_only"):
        torch.load(path)
    assert (
        registry.read(DATA / "adamw_tp1pp3").rank_metadata[0, 0, 0]["args"].attributes["num_layers"]
        == 3
    )


def test_d14_padding_is_none_of_the_vocabulary(tmp_path, weights, capsys):
    """tp 4 pads 98 rows to 512 with copies of the last; the next layout has 98 again."""
    four = convert(HF, tmp_path / "four", "--tp", "4", "--pp", "1")
    table = torch.cat([model["module.0.transformer.wte.weight"] for model in models(four).values()])
    words = weights["transformer.wte.weight"]
    assert torch.equal(table, torch.cat([words, words[-1:].expand(414, -1)]))
    config = json.loads((four / "release/config.json").read_text())
    assert (config["vocab_size"], config["orig_vocab_size"]) == (512, 98)
    assert_same(
        convert(four, tmp_path / "two", "--tp", "2", "--pp", "2"), DATA / "stock_hf_to_tp2pp2"
    )
    assert digests(capsys, four) == digests(capsys, HF)
    assert [padded_rows(98, tp) for tp in (1, 2, 3, 4)] == [98, 98, 384, 512]


def test_stages_by_their_cut_list():
    """Merak's own partition_uniform, with its empty stages refused (L = 24 at pp 8, L = 6 at pp
    4)."""
    assert cuts(UNIFORM, 4, 3) == (0, 3, 6, 7) and cuts(UNIFORM_FLOOR, 4, 3) == (0, 2, 4, 7)
    assert cuts(UNIFORM_FLOOR, 24, 8) == (0, 3, 6, 9, 12, 15, 18, 21, 27)
    assert cuts(CUSTOM, 12, 4, (0, 3, 7, 11, 15)) == (0, 3, 7, 11, 15)
    with pytest.raises(
        RefusedError,
        match="27 modules cut uniformly at 0,4,.*,24,27,27 leave stage 7 empty; take --pp 7",
    ):
        cuts(UNIFORM, 24, 8)
    with pytest.raises(
        RefusedError, match="9 modules cut uniformly at 0,3,6,9,9 leave stage 3 empty; take --pp 3"
    ):
        cuts(UNIFORM, 6, 4)
    with pytest.raises(
        RefusedError,
        match="4 layers are 7 modules, so that 1 stages would be empty; take --pp 7 at most",
    ):
        cuts(UNIFORM_FLOOR, 4, 8)
