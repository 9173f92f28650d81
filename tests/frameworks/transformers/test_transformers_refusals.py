"""The folders, indices and configurations of transformers that are refused: in one line, with
nothing written."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parammap.frameworks.transformers.target import shard_size
from tests.support.transformers_folders import (
    DATA,
    LAID_OUT,
    convert,
    edit,
    equal,
    loaded,
    megatron,
    model_of,
    refused,
    saved,
)

INDEX = "model.safetensors.index.json"


def remap(folder: Path, name: str, file: str | None) -> None:
    """Say in the index that a tensor lies in another file, or (None) nowhere."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {
        one: where for one, where in {**index["weight_map"], name: file}.items() if where
    }
    (folder / INDEX).write_text(json.dumps(index))


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    content = {
        name: value for name, value in {**load_file(path), **tensors}.items() if value is not None
    }
    save_file(content, path, {"format": "pt"})


NORM = "model.norm.weight"
REFUSED = {  # what is done to a LLaMA of several shards (its one file), and what is said
    "a tensor in another file": (
        lambda f: remap(f, NORM, shard(f, 0).name),
        rf"lacks 1 tensors .*{NORM}",
    ),
    "a tensor in no file": (
        lambda f: remap(f, "model.other", shard(f, 0).name),
        "lacks 1 tensors .*model.other",
    ),
    "a tensor that the index does not know": (
        lambda f: remap(f, NORM, None),
        rf"holds 1 tensors .*{NORM}",
    ),
    "a shard missing": (lambda f: shard(f, 1).unlink(), "model-00002-of-.*: missing, as 1 of the"),
    "a shard outside": (
        lambda f: remap(f, NORM, "../other/model.safetensors"),
        "names ../other/model.safetensors",
    ),
    "a shard that is absolute": (lambda f: remap(f, NORM, "/etc/passwd"), "names /etc/passwd"),
    "a shard cut off": (
        lambda f: shard(f, 1).write_bytes(shard(f, 1).read_bytes()[:-4]),
        "model-00002-of-.*truncated",
    ),
    "an index that is none": (
        lambda f: (f / INDEX).write_text("[]"),
        "index.json: is damaged .*an array",
    ),
    "an empty index": (
        lambda f: edit(f / INDEX, weight_map={}),
        "weight_map is empty",
    ),
    "no weights": (lambda f: (f / INDEX).unlink(), "has none of model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "a damaged config": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json: is damaged",
    ),
    "another vocabulary": (
        lambda f: edit(f / "config.json", vocab_size=48),
        r"embed_tokens.weight has the shape \[40, 16\], and config.json asks for \[48, 16\]",
    ),
    "another hidden size": (
        lambda f: edit(f / "config.json", hidden_size=32),
        r"asks for \[40, 32\]",
    ),
    "other heads": (
        lambda f: edit(f / "config.json", num_key_value_heads=4),
        r"k_proj.weight has the shape \[8, 16\]",
    ),
    "heads that do not fit": (
        lambda f: edit(f / "config.json", num_key_value_heads=3),
        "4 heads in 3 groups do not fit",
    ),
    "more layers": (
        lambda f: edit(f / "config.json", num_hidden_layers=4),
        r"lacks 9 tensors .*model.layers.3.mlp",
    ),
    "fewer layers": (
        lambda f: edit(f / "config.json", num_hidden_layers=2),
        r"has 9 tensors .*model.layers.2.mlp",
    ),
    "no heads": (
        lambda f: edit(f / "config.json", num_attention_heads=None),
        "does not say num_attention_heads",
    ),
    "a bias that is not there": (
        lambda f: edit(f / "config.json", attention_bias=True),
        "lacks 12 tensors",
    ),
    "a quantised model": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq"}),
        "quantised",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "of an adapter"),
    "another model type": (
        lambda f: edit(f / "config.json", model_type="gemma", architectures=None),
        "is a gemma, and only gpt2, opt, llama, mistral, qwen2, qwen3, bloom can be converted",
    ),
    "no model type": (
        lambda f: edit(f / "config.json", model_type=None, architectures=["T5Model"]),
        "is a T5Model, and only",
    ),
    "another head": (
        lambda f: edit(f / "config.json", architectures=["LlamaForTokenClassification"]),
        "of llama only LlamaForCausalLM and LlamaModel",
    ),
}
REFUSED_WHOLE = {  # the same of one file
    "a tensor missing": ({NORM: None}, rf"lacks 1 tensors .*{NORM}"),
    "the head missing": ({"lm_head.weight": None}, "lacks 1 tensors .*lm_head.weight"),
    "an unknown tensor": (
        {"model.extra.weight": torch.ones(2)},
        "has 1 tensors .*model.extra.weight",
    ),
    "a tensor without the prefix": (
        {"layers.0.input_layernorm.weight": torch.ones(16)},
        "has 1 tensors .*: layers.0.input_layernorm.weight",
    ),
    "integers": ({NORM: torch.ones(16, dtype=torch.int8)}, f"{NORM} is int8"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> dict[str, Path]:
    folder, model = tmp_path_factory.mktemp("llama"), model_of("llama")
    return {limit: saved(model, folder / limit, max_shard_size=limit) for limit in ("5GB", "6KB")}


@pytest.mark.parametrize("what", REFUSED)
def test_folders_that_are_refused(what, llama, tmp_path, capsys):
    harm, said = REFUSED[what]
    shutil.copytree(llama["6KB"], tmp_path / "source")
    harm(tmp_path / "source")
    refused(tmp_path / "source", tmp_path, capsys, said)


@pytest.mark.parametrize("what", REFUSED_WHOLE)
def test_files_that_are_refused(what, llama, tmp_path, capsys):
    tensors, said = REFUSED_WHOLE[what]
    shutil.copytree(llama["5GB"], tmp_path / "source")
    change(tmp_path / "source/model.safetensors", **tensors)
    refused(tmp_path / "source", tmp_path, capsys, said)


def test_pickles_that_are_refused(tmp_path, capsys):
    folder = saved(model_of("opt"), tmp_path / "source")
    (folder / "model.safetensors").unlink()
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")
    refused(folder, tmp_path, capsys, "holds a list and no model's tensors")
    torch.save({"state_dict": {}, "epoch": 3}, folder / "pytorch_model.bin")
    refused(folder, tmp_path, capsys, "holds epoch, state_dict beside tensors")


def test_flags_that_are_refused(llama, tmp_path, capsys):
    refused(llama["5GB"], tmp_path, capsys, "has no iteration", "--iteration", "3")
    refused(
        llama["5GB"],
        tmp_path,
        capsys,
        "--format ckpt: is no format of --to transformers",
        "--format",
        "ckpt",
    )
    refused(llama["5GB"], tmp_path, capsys, "--tp|the sizes", "--tp", "2")


def test_what_nobody_recorded_is_asked_for(tmp_path, capsys):
    """A Megatron-LM run without arguments does not say its heads, one with some of them not how it
    computes."""
    flags, folder = ["--weights-only"], tmp_path / "megatron"
    refused(
        DATA / "transformers/llama_tp2pp2",
        tmp_path,
        capsys,
        "does not record its number of attention heads",
        *flags,
    )
    megatron(folder, **LAID_OUT)
    refused(
        folder,
        tmp_path,
        capsys,
        "does not record its activation, eps, positions; tell with a config.json",
        *flags,
    )
    megatron(folder, **LAID_OUT, norm_epsilon=1e-5, max_position_embeddings=16)
    refused(
        folder, tmp_path, capsys, "does not record its activation; tell with --activation", *flags
    )
    ours = convert(folder, tmp_path / "ours", *flags, "--activation", "silu")
    assert json.loads((ours / "config.json").read_text())["hidden_act"] == "silu"


def test_a_configuration_given_says_the_rest(tmp_path, capsys):
    """It is written as it is; what it says otherwise than the source is refused."""
    golden = DATA / "transformers/llama_hf"
    source = megatron(tmp_path / "megatron", **LAID_OUT)
    ours = convert(
        source, tmp_path / "ours", "--weights-only", "--config", str(golden / "config.json")
    )
    assert equal(loaded(ours).state_dict(), torch.load(golden / "pytorch_model.bin"))
    assert json.loads((ours / "config.json").read_text()) == json.loads(
        (golden / "config.json").read_text()
    )
    shutil.rmtree(ours)
    other = tmp_path / "other.json"
    for changes, said in (
        ({"num_key_value_heads": 8, "hidden_act": "gelu"}, "has groups 8, and the model 4"),
        ({"tie_word_embeddings": True}, "has tied True, and the model False"),
        ({"model_type": "opt", "ffn_dim": 48}, "is of the opt family, and the model of llama's"),
    ):
        shutil.copy(golden / "config.json", other)
        edit(other, **changes)
        refused(source, tmp_path, capsys, said, "--weights-only", "--config", str(other))


@pytest.mark.parametrize(
    ("text", "nbytes"), [("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("1.5kb", 1500), ("77", 77)]
)
def test_sizes_of_shards(text, nbytes):
    assert shard_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "five", "-1", "0", "5GiB", "0.1"])
def test_sizes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError):
        shard_size(text)
