"""A model family is one file: transformers' own models of families that ParamMap does not have are
converted once such a file is registered."""

import runpy
import shutil
from contextlib import contextmanager

import pytest
import torch
import transformers

from parammap import families
from parammap.cli.main import main
from parammap.families import Family, in_layer, row
from parammap.tensors.arrangement import REPLICATED, SHARD_0
from tests.support import paths
from tests.support.conversions import digests
from tests.support.transformers_folders import TOKENS, convert, files_of, loaded, refused, saved

FILES = paths.TESTS / "data/families"
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
EXPERTS = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
#: the family's file, and transformers' configuration of a model
CASES = {
    "phi3": ("phi3", lambda: transformers.Phi3Config(**SIZES)),
    "phi3-without-groups": (
        "phi3",
        lambda: transformers.Phi3Config(**{**SIZES, "num_key_value_heads": 4}),
    ),
    "qwen3-moe": ("qwen3_moe", lambda: transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)),
    "qwen3-moe-biased": (
        "qwen3_moe",
        lambda: transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, attention_bias=True),
    ),
}


@contextmanager
def new_family(name, folder):
    """The family of a file that lies in a folder of a user's own."""
    file = shutil.copy(FILES / f"{name}.py", folder)
    with families.registered(runpy.run_path(str(file))["FAMILY"]) as family:
        yield family


def model_of(case):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CASES[case][1]()).eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("limit", ["5GB", "4KB"])
def test_one_file_adds_a_family(case, limit, tmp_path, capsys):
    """What is written is what the library's save_pretrained writes, byte for byte."""
    source = saved(model_of(case), tmp_path / "source")
    again = saved(model_of(case), tmp_path / "expected", max_shard_size=limit)
    refused(source, tmp_path, capsys, f"is a {CASES[case][0]}, and only gpt2, .* can be converted")
    with new_family(CASES[case][0], tmp_path):
        out = convert(source, tmp_path / "out", "--max-shard-size", limit)
        assert files_of(out) == files_of(again)
        assert digests(out) == digests(source)
        assert main(["verify", str(out), "--against", str(source)]) == 0
        assert main(["inspect", str(out)]) == 0
    refused(source, tmp_path / "out", capsys, "and only gpt2, .* can be converted")


@pytest.mark.parametrize("case", ["phi3", "phi3-without-groups"])
def test_it_goes_to_megatron_and_back(case, tmp_path):
    """Cut over ranks, and read as what Megatron-LM computes: a LLaMA, of the same logits."""
    model = model_of(case)
    source = saved(model, tmp_path / "source")
    with new_family("phi3", tmp_path):
        before = digests(source)
        there = tmp_path / "megatron"
        flags = ["--to", "megatron", "--tp", "2", "--pp", "1", "--workers", "1"]
        assert main(["convert", str(source), str(there), *flags]) == 0
        assert digests(there) == before
    assert digests(there) == before
    back = loaded(convert(there, tmp_path / "back"))
    assert type(back) is transformers.LlamaForCausalLM
    with torch.no_grad():  # one product of matrices rounds otherwise than three
        ours, theirs = (one.double()(TOKENS).logits for one in (back, model))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_mixture_that_no_other_framework_computes_is_refused(tmp_path, capsys):
    source = saved(model_of("qwen3-moe"), tmp_path / "source")
    with new_family("qwen3_moe", tmp_path):
        said = "is a model of the qwen3_moe family, and Megatron-LM has gpt2, llama only"
        refused(source, tmp_path, capsys, said, "--to", "megatron")


def test_a_tensor_that_is_missing_is_named(tmp_path, capsys):
    """By what config.json asks for; by what a file of the family says belongs together."""
    source = saved(model_of("qwen3-moe"), tmp_path / "source", safe_serialization=False)
    path = source / "pytorch_model.bin"
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    content = torch.load(path)
    torch.save({key: value for key, value in content.items() if key != name}, path)
    with new_family("qwen3_moe", tmp_path):
        refused(source, tmp_path, capsys, f"lacks 1 tensors that it should have .*{name}")


def family(**changes):
    rows = in_layer(
        {"core": "decoder.layers.{i}."}, row("norm.weight", SHARD_0, core="norm.weight")
    )
    return Family(**{"name": "new", "title": "New", "rows": rows, **changes})


def test_a_family_that_contradicts_another_is_refused():
    core = {"core": "decoder.layers.{i}."}
    other = in_layer(core, row("mlp.fc1.weight", SHARD_0, core="mlp.linear_fc1.weight"))
    with pytest.raises(ValueError, match="linear_fc1.weight is .* in a known family"):
        families.register(family(rows=other))
    for name in ("gpt2", "mistral", "core"):
        with pytest.raises(ValueError, match=f"{name}: is known already"):
            families.register(family(name=name))
    with pytest.raises(ValueError, match="has no arrangement"):
        family(rows=(row("norm.weight", core="norm.weight"),))
    with pytest.raises(ValueError, match="config.json"):
        family(rows=(row("norm.weight", SHARD_0, transformers="norm.weight"),))
    assert list(families.FAMILIES) == ["gpt2", "opt", "llama", "bloom", "mixture", "yuan"]


def test_its_own_rows_count_before_those_that_it_shares():
    other = row("layers.{i}.norm.weight", REPLICATED, core="other.weight", legacy="norm.weight")
    (own,) = family(shares=((other,),)).tables["core"].values()
    assert (own.arrangement, own.names) == (SHARD_0, ("decoder.layers.{i}.norm.weight",))
    assert family(shares=((other,),)).dialects == ("core", "legacy")


def test_names_are_looked_up_anew():
    name = "decoder.layers.3.norm.weight"
    assert families.find(name, families.CORE) is None
    with families.registered(family()):
        assert families.find(name, families.CORE).canonical == "layers.{i}.norm.weight"
    assert families.find(name, families.CORE) is None


def test_the_walk_in_contributing_is_of_a_real_file():
    text = (paths.ROOT / "CONTRIBUTING.md").read_text()
    assert f"```python\n{(FILES / 'phi3.py').read_text()}```" in text
