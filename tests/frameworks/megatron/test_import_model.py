"""Models of other frameworks as Megatron-LM's and metaseq's: computed by megatron-core itself,
equal to files that the frameworks wrote, and what has no architecture in common refused."""

import argparse
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from parammap.cli.main import main
from parammap.frameworks import registry
from parammap.frameworks.architecture import architecture_of
from parammap.proof import verify
from tests.support import hub, megatron_logits, paths
from tests.support.meaning import CASES, ROUND_OFF
from tests.support.torch_load import torch_load

DATA = paths.TESTS / "data"
VOCAB, LENGTH = 250, 24
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_positions": 32, "n_inner": 96}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rope_theta": 50_000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TP2_PP2 = ("--tp", "2", "--pp", "2")
#: whose layers the wheels of megatron-core have here
LOCAL = ("--transformer-impl", "local")


def convert(source: Path, out: Path, to: str, *flags: str) -> Path:
    assert main(["convert", str(source), str(out), "--to", to, "--workers", "1", *flags]) == 0
    return out


def digests(source: Path, **reading: Any) -> dict[str, tuple]:
    """Of all weights but a vocabulary's padding."""
    summed = verify.digests(registry.read(source, weights_only=True, **reading).index, 1)
    return {
        tensor.name: (tensor.dtype, tensor.shape, one.digests[0])
        for tensor, one in summed.items()
        if not tensor.name.endswith(".padding")
    }


def saved(model: Any, folder: Path) -> Path:
    """The model's folder, all of its parameters drawn: norms and biases too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * 0.2
                + (parameter.dim() == 1) * 0.5
            )
    model.save_pretrained(folder)
    return folder


def computed(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """What transformers computes."""
    with torch.no_grad():
        return (
            transformers.AutoModelForCausalLM.from_pretrained(folder)
            .eval()(torch.from_numpy(tokens))
            .logits.numpy()
        )


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, (2, LENGTH))


MODELS = {
    "gpt2": transformers.GPT2Config(n_layer=4, n_head=4, **GPT2),
    "gpt2-exact-gelu": transformers.GPT2Config(
        n_layer=4, n_head=4, activation_function="gelu", **GPT2
    ),
    "llama": transformers.LlamaConfig(num_hidden_layers=4, **LLAMA),
    "llama3": transformers.LlamaConfig(
        num_hidden_layers=4, rope_scaling=LLAMA3, tie_word_embeddings=True, **LLAMA
    ),
    "biased": transformers.LlamaConfig(
        num_hidden_layers=4, head_dim=12, attention_bias=True, mlp_bias=True, **LLAMA
    ),
    "qwen2": transformers.Qwen2Config(num_hidden_layers=4, **LLAMA),
}
FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("case", "core"),
    [
        ("gpt2", "0.16.1"),
        pytest.param("gpt2", "0.6.0", marks=FULL),
        pytest.param("gpt2-exact-gelu", "0.8.0", marks=FULL),
        ("gpt2-exact-gelu", "0.16.1"),
        ("llama3", "0.16.1"),
        pytest.param("llama", "0.12.3", marks=FULL),
        pytest.param("biased", "0.16.1", marks=FULL),
        ("qwen2", "0.16.1"),
    ],
)
def test_megatron_core_computes_what_transformers_does(case, core, tokens, tmp_path):
    """At tp 2 · pp 2, loaded strictly; then back, to the last bit."""
    source = saved(transformers.AutoModelForCausalLM.from_config(MODELS[case]), tmp_path / "hf")
    out = convert(source, tmp_path / "megatron", "megatron", *TP2_PP2, *LOCAL)
    theirs, ours = computed(source, tokens), megatron_logits.run(core, out, tokens, tmp_path)
    assert ours.shape == (*tokens.shape, 256) and theirs.std() > 0.3
    assert np.abs(ours[..., :VOCAB] - theirs).max() < 2e-5 * np.abs(theirs).max()
    assert digests(out) == digests(source)
    back = convert(out, tmp_path / "back", "transformers")
    assert np.array_equal(computed(back, tokens), theirs)


@pytest.mark.parametrize("case", ["gpt-tp2pp2", "llama-tp2pp2"])
def test_transformers_computes_what_megatron_core_has_trained(trained, tmp_path, case):
    """What megatron-core has trained at tp 2 · pp 2; its losses count the vocabulary's padding,
    which transformers lacks."""
    run = trained(**CASES[case])
    out = convert(run.path, tmp_path / "hf", "transformers")
    losses = np.load(run.path / "truth/losses_dp000.npz")
    tokens = losses["tokens"][0, :, :-1]
    theirs, ours = (
        megatron_logits.run(CASES[case]["core"], run.path, tokens, tmp_path),
        computed(out, tokens),
    )
    assert np.abs(ours - theirs[..., :VOCAB]).max() < 1e-5 and ours.std() > 0.2
    each = torch.nn.functional.cross_entropy(
        torch.from_numpy(theirs).transpose(1, 2),
        torch.from_numpy(losses["tokens"][0, :, 1:]),
        reduction="none",
    )
    assert np.abs(each.numpy() - losses["evaluated"][0]).max() < ROUND_OFF, (
        "not what the run itself computed"
    )


def test_the_files_are_those_that_megatron_core_saved(tmp_path):
    """A LLaMA of transformers, of which megatron-core saved the same weights at tp 2 · pp 2."""
    out = convert(
        DATA / "transformers/llama_hf",
        tmp_path / "out",
        "megatron",
        *TP2_PP2,
        *LOCAL,
        "--make-vocab-size-divisible-by",
        "1",
    )
    theirs = sorted((DATA / "transformers/llama_tp2pp2").glob("iter_*/*/model_optim_rng.pt"))
    assert len(theirs) == 4
    for path in theirs:
        ours = torch.load(out / "release" / path.parent.name / path.name, weights_only=False)
        model = {
            name: value
            for name, value in torch.load(path, weights_only=False)["model"].items()
            if isinstance(value, torch.Tensor)
        }
        assert ours["model"].keys() == model.keys()
        assert all(torch.equal(ours["model"][name], value) for name, value in model.items())


def test_megatron_lm_is_told_what_it_compares_and_takes_over(tmp_path):
    out = convert(hub.save("llama", tmp_path / "hf"), tmp_path / "out", "megatron", *TP2_PP2)
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "release"
    content = torch.load(out / "release/mp_rank_01_001/model_optim_rng.pt", weights_only=False)
    assert isinstance(content["args"], argparse.Namespace)
    assert (content["checkpoint_version"], content["iteration"]) == (3.0, 0)
    told = vars(content["args"])
    assert {
        name: told[name]
        for name in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "group_query_attention",
            "kv_channels",
            "ffn_hidden_size",
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "world_size",
            "vocab_size",
            "padded_vocab_size",
            "add_position_embedding",
            "position_embedding_type",
            "rotary_base",
            "normalization",
            "swiglu",
            "add_bias_linear",
            "untie_embeddings_and_output_weights",
            "max_position_embeddings",
            "norm_epsilon",
        )
    } == {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "group_query_attention": True,
        "kv_channels": 4,
        "ffn_hidden_size": 48,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "world_size": 4,
        "vocab_size": 96,
        "padded_vocab_size": 256,
        "add_position_embedding": False,
        "position_embedding_type": "rope",
        "rotary_base": 5000,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "max_position_embeddings": 16,
        "norm_epsilon": 1e-6,
    }
    known, before = (architecture_of(registry.read(folder)) for folder in (out, tmp_path / "hf"))
    assert {name for name in known.__slots__ if getattr(known, name) != getattr(before, name)} == {
        "config"
    }


def test_the_user_is_told_what_stays_behind_and_what_to_say(tmp_path, capsys):
    with tarfile.open(DATA / "deepspeed/mds_gpt_pp2tp2dp2_bf16.tar.xz") as archive:
        archive.extractall(tmp_path / "ds", filter="data")
    source = next(path.parent for path in (tmp_path / "ds").rglob("latest"))
    before = digests(source)
    out = convert(
        source, tmp_path / "out", "megatron", "--tp", "4", "--replicas", "first", "--weights-only"
    )
    told = capsys.readouterr().out
    assert (
        "a release, of weights only: the iteration 3 stays behind" in told
        and (out / "release").is_dir()
    )
    assert (
        "run Megatron-LM with --use-checkpoint-args --transformer-impl transformer_engine, which"
        in told
    )
    assert "vocabulary padded to" in told
    assert "nobody recorded its activation and eps" in told
    whole = convert(source, tmp_path / "whole", "megatron", "--tp", "4", "--replicas", "first")
    told = capsys.readouterr().out
    assert (
        "run Megatron-LM with --bf16 --use-distributed-optimizer "
        "--accumulate-allreduce-grads-in-fp32 --no-load-rng "
        "--use-checkpoint-args --transformer-impl transformer_engine, which"
    ) in told
    assert (
        "the optimizer goes on from step 3: in torch format its buckets are those of megatron-core "
        "0.16.1" in told
    )
    manifest = json.loads((whole / "parammap_manifest.json").read_text())
    assert (
        not any("exp_avg" in name for name in manifest["dropped"])
        and (whole / "iter_0000003").is_dir()
    )
    after = digests(out)
    assert {name: one[1] for name, one in after.items()} == {
        name: one[1] for name, one in before.items()
    }


@pytest.mark.parametrize("to", ["mindspore", "megatron-dist"])
def test_the_other_formats_of_megatrons_take_it_too(tmp_path, to):
    source = hub.save("gpt2", tmp_path / "hf")
    out = convert(source, tmp_path / "out", to, *(TP2_PP2 if to == "mindspore" else ()))
    assert digests(out) == digests(source)
    assert hub.logits(convert(out, tmp_path / "back", "transformers")).equal(hub.logits(source))


# ----------------------------------------------------------------------------------------------------------
# metaseq


@pytest.mark.parametrize(
    ("golden", "parts", "shards"), [("mp2dp2_fp16", 2, 2), ("mp1dp3_fp32", 1, 3)]
)
def test_an_opt_of_transformers_becomes_metaseqs_own_shards(tmp_path, golden, parts, shards):
    """metaseq's flat parameters, as a whole model of transformers', and cut and flattened as
    metaseq's FSDP did."""
    theirs = DATA / "metaseq" / golden
    if not list(theirs.glob("checkpoint_3-*.pt")):
        pytest.skip(
            f"tests/data/metaseq/{golden} is not there: it is written by metaseq itself, which is "
            f"no package"
        )
    hf = convert(theirs / "checkpoint_3", tmp_path / "hf", "transformers", "--weights-only")
    out = convert(hf, tmp_path / "out", "metaseq", "--tp", str(parts), "--dp", str(shards))
    for part, shard in np.ndindex(parts, shards):
        ending = f"model_part-{part}-shard{shard}.pt"
        ours, golden_ = (
            torch_load(out / f"checkpoint_last-{ending}"),
            torch_load(theirs / f"checkpoint_3-{ending}"),
        )
        flats = {name for name in golden_["model"] if "flat_param" in name}
        assert flats <= ours["model"].keys() and len(flats) == 4
        assert all(torch.equal(ours["model"][name], golden_["model"][name]) for name in flats)
        described = [
            [
                (entry["fsdp_path"], entry["params"])
                for entry in one["shard_metadata"]["param_metadata"]
            ]
            for one in (ours, golden_)
        ]
        assert described[0] == described[1]
        settings = vars(golden_["cfg"]["model"])
        own = ours["cfg"]["model"]
        assert {
            name: settings[name] for name in own.keys() & settings.keys() - {"tokens_per_sample"}
        } == {name: own[name] for name in own.keys() & settings.keys() - {"tokens_per_sample"}}
    assert len(list(out.glob("*.pt"))) == parts * shards


def test_an_opt_of_alpa_becomes_metaseqs(tmp_path):
    source = hub.save("opt", tmp_path / "hf")
    served = convert(source, tmp_path / "np", "alpa", "--dtype", "float32")
    out = convert(served, tmp_path / "out", "metaseq", "--form", "singleton")
    assert digests(out) == digests(source)
    assert hub.logits(convert(out, tmp_path / "back", "transformers")).equal(hub.logits(source))


# ---------------------------------------------------------------------------------------------------------
# refusals

REFUSED = {
    "opt": (
        "opt",
        {},
        "megatron",
        "is a model of the opt family, and Megatron-LM has gpt2, llama only",
    ),
    "bloom": (
        "bloom",
        {},
        "megatron",
        "is a model of the bloom family, and Megatron-LM has gpt2, llama only",
    ),
    "relu": (
        "gpt2",
        {"activation_function": "relu"},
        "megatron",
        "its activation is relu, which Megatron-LM's",
    ),
    "half of the biases": (
        "llama",
        {"attention_bias": True},
        "megatron",
        "has biases of q, attention.out alone",
    ),
    "yarn": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "megatron",
        "stretches its rotary positions by .*yarn",
    ),
    "scaled by layer": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "megatron",
        "has scale_attn_by_inverse_layer_idx True, which Megatron-LM does not compute",
    ),
    "no opt": ("gpt2", {}, "metaseq", "is a model of the gpt2 family, and metaseq has opt only"),
    "gelu": (
        "opt",
        {"activation_function": "gelu"},
        "metaseq",
        "cannot be metaseq's OPT: its activation is gelu",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_architectures_are_refused(tmp_path, capsys, case):
    family, changes, to, message = REFUSED[case]
    source = hub.save(family, tmp_path / "hf", **changes)
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", to]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_heads_that_nobody_recorded_are_asked_for(tmp_path, capsys):
    served = convert(hub.save("opt", tmp_path / "hf"), tmp_path / "np", "alpa")
    shutil.copytree(
        served, tmp_path / "alone", ignore=shutil.ignore_patterns("parammap_manifest.json")
    )
    assert main(["convert", str(tmp_path / "alone"), str(tmp_path / "out"), "--to", "metaseq"]) == 2
    assert "cannot be metaseq's OPT: nobody recorded its number of heads" in capsys.readouterr().err
