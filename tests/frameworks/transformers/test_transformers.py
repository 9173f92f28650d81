"""transformers' folders, in and out, against the library itself: what it saves we read, what we
write it saves byte for byte and loads with no key left over."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from parammap.cli.main import main
from parammap.formats import safetensors as container
from parammap.frameworks import registry
from parammap.frameworks.architecture import architecture_of
from parammap.frameworks.transformers import target
from parammap.frameworks.transformers.model import ModelConfig
from tests.support.transformers_folders import (
    CASES,
    COMPUTED,
    DATA,
    LAID_OUT,
    POSITIONS,
    TOKENS,
    VOCAB,
    convert,
    digests,
    edit,
    equal,
    files_of,
    loaded,
    megatron,
    model_of,
    refused,
    saved,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("limit", ["5GB", "4KB"])
def test_safetensors_are_the_librarys_own_byte_for_byte(case, limit, tmp_path):
    """Whole folders: shards, index, config.json, generation_config.json; from shards, and from
    pickles."""
    model = model_of(case)
    theirs = saved(model, tmp_path / "theirs", max_shard_size=limit)
    ours = convert(theirs, tmp_path / "ours", "--max-shard-size", limit)
    assert files_of(ours) == files_of(theirs) and len(files_of(ours)) >= (
        6 if limit == "4KB" else 2
    )
    assert digests(ours) == digests(theirs)
    pickled = saved(model, tmp_path / "pickled", max_shard_size="6KB", safe_serialization=False)
    again = convert(pickled, tmp_path / "again", "--max-shard-size", limit)
    assert files_of(again) == files_of(theirs)
    copy = loaded(ours)
    assert equal(copy.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(copy(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("limit", ["5GB", "4KB"])
def test_pickles_hold_what_the_librarys_own_do(case, limit, tmp_path):
    """The same files with the same keys in the same order, tied ones in one storage."""
    model = model_of(case)
    theirs = saved(model, tmp_path / "theirs", max_shard_size=limit, safe_serialization=False)
    ours = convert(
        saved(model, tmp_path / "source"),
        tmp_path / "ours",
        "--format",
        "bin",
        "--max-shard-size",
        limit,
    )
    assert files_of(ours).keys() == files_of(theirs).keys()
    for path in theirs.iterdir():
        if path.suffix == ".bin":
            one, other = torch.load(ours / path.name), torch.load(path)
            assert list(one) == list(other) and equal(one, other)
            assert len({value.data_ptr() for value in one.values()}) == len(
                {value.data_ptr() for value in other.values()}
            )
        else:
            assert (ours / path.name).read_bytes() == path.read_bytes()
    assert equal(loaded(ours).state_dict(), model.state_dict())


@pytest.mark.parametrize("case", ["gpt2", "opt", "llama", "bloom"])
def test_base_models_have_no_prefix_and_no_head(case, tmp_path):
    base = model_of(case).base_model
    theirs = saved(base, tmp_path / "theirs")
    ours = convert(theirs, tmp_path / "ours")
    assert files_of(ours) == files_of(theirs)
    assert equal(loaded(ours, transformers.AutoModel).state_dict(), base.state_dict())
    pickled = convert(theirs, tmp_path / "pickled", "--format", "bin")
    assert equal(torch.load(pickled / "pytorch_model.bin"), dict(base.state_dict()))


@pytest.mark.parametrize("case", ["gpt2", "bloom"])
def test_whole_models_saved_without_the_prefix(case, tmp_path):
    """As the hub has GPT-2 and BLOOM: names of the base model, the class of the whole one, an alias
    of a setting."""
    model = model_of(case)
    folder = saved(model, tmp_path / "hub")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): value for name, value in tensors.items()},
        folder / "model.safetensors",
    )
    edit(folder / "config.json", n_head=None, num_attention_heads=4)
    assert equal(loaded(convert(folder, tmp_path / "ours")).state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_sixteen_bits_stay(dtype, case, tmp_path):
    model = model_of(case, dtype)
    theirs = saved(model, tmp_path / "theirs")
    ours = convert(theirs, tmp_path / "ours")
    assert files_of(ours) == files_of(theirs) and loaded(ours).dtype == dtype


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["gpt2", "qwen2"])
def test_a_cast_is_torchs_and_config_says_so(dtype, case, tmp_path):
    model = model_of(case)
    ours = convert(saved(model, tmp_path / "source"), tmp_path / "ours", "--dtype", dtype)
    theirs = saved(model.to(getattr(torch, dtype)), tmp_path / "theirs")
    assert files_of(ours) == files_of(theirs)


def test_a_cast_is_told_by_the_older_name_where_none_is_there(tmp_path):
    folder = saved(model_of("llama"), tmp_path / "source")
    edit(folder / "config.json", dtype=None)
    told = json.loads(
        (convert(folder, tmp_path / "ours", "--dtype", "float16") / "config.json").read_text()
    )
    assert told["torch_dtype"] == "float16" and "dtype" not in told


def test_what_stands_beside_the_weights_comes_along(tmp_path):
    folder = saved(model_of("llama"), tmp_path / "source")
    beside = {
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer.model": bytes(range(256)) * 2000,
        "merges.txt": b"",
    }
    for name, content in beside.items():
        (folder / name).write_bytes(content)
    (folder / "training_args.pt").write_bytes(b"of the run")
    (folder / "README.md").write_text("not the model's")
    ours = files_of(convert(folder, tmp_path / "ours"))
    assert {name: ours[name] for name in beside} == beside
    assert ours.keys() == {*beside, "config.json", "generation_config.json", "model.safetensors"}


def test_safetensors_are_taken_before_pickles(tmp_path, capsys):
    folder = saved(model_of("opt", seed=1), tmp_path / "source", safe_serialization=False)
    model = model_of("opt")
    saved(model, folder)
    ours = convert(folder, tmp_path / "ours")
    assert equal(loaded(ours).state_dict(), model.state_dict())
    assert (
        "model.safetensors: was taken, as transformers does, and not pytorch_model.bin"
        in capsys.readouterr().out
    )


def test_buffers_of_old_releases_are_dropped_and_named(tmp_path, capsys):
    """h.*.attn.bias and masked_bias of GPT-2, rotary_emb.inv_freq of LLaMA; and the serialisation
    before zip archives."""
    buffers = {
        "gpt2": {
            "transformer.h.{i}.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8).tril(),
            "transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4),
        },
        "llama": {"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2)},
    }
    for case, extra in buffers.items():
        model = model_of(case)
        folder = saved(model, tmp_path / case)
        old = {
            **model.state_dict(),
            **{name.format(i=i): value for name, value in extra.items() for i in range(3)},
        }
        (folder / "model.safetensors").unlink()
        torch.save(old, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        ours = convert(folder, tmp_path / f"{case}-ours")
        assert equal(loaded(ours).state_dict(), model.state_dict())
        said = capsys.readouterr().out
        assert all(name.format(i="{0-2}") in said for name in extra)
        dropped = json.loads((ours / "parammap_manifest.json").read_text())["dropped"]
        assert sorted(dropped) == sorted(name.format(i=i) for name in extra for i in range(3))


def test_a_tied_head_stored_as_a_copy_must_be_one(tmp_path, capsys):
    model = model_of("gpt2")
    folder = saved(model, tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert equal(loaded(convert(folder, tmp_path / "ours")).state_dict(), model.state_dict())
    tensors["lm_head.weight"][7, 3] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert main(["convert", str(folder), str(tmp_path / "refused"), "--to", "transformers"]) != 0
    assert (
        "embedding.word.weight" in capsys.readouterr().err and not (tmp_path / "refused").exists()
    )


# ------------------------------------------------------------------------------------------------------
# from elsewhere


def test_megatron_becomes_the_llama_that_it_was_proved_to_be(tmp_path):
    """tp 2 · pp 2 of megatron-core; the tensors and logits are those of a LLaMA that was proved
    equal to it."""
    source = megatron(tmp_path / "megatron", **LAID_OUT, **COMPUTED)
    ours = convert(source, tmp_path / "ours", "--weights-only", "--max-shard-size", "30KB")
    golden = DATA / "transformers/llama_hf"
    model, truth = loaded(ours), torch.load(golden / "logits.pt")
    assert equal(model.state_dict(), torch.load(golden / "pytorch_model.bin"))
    with torch.no_grad():
        difference = (model(truth["input_ids"]).logits - truth["logits"]).abs().max()
    assert difference < 1e-4 < truth["logits"].std()
    assert digests(ours) == digests(source, weights_only=True)
    told, config = (
        json.loads((ours / "config.json").read_text()),
        json.loads((golden / "config.json").read_text()),
    )
    assert {
        name: told[name] for name in told.keys() & config.keys() - {"bos_token_id", "eos_token_id"}
    } == {
        name: config[name]
        for name in told.keys() & config.keys() - {"bos_token_id", "eos_token_id"}
    }
    assert (told["rope_theta"], told["rope_scaling"], told["bos_token_id"]) == (10000.0, None, None)


@pytest.fixture
def forgetful(monkeypatch):
    """forgetful(**changes): from now on, a checkpoint's architecture comes without config.json, and
    with these changes."""
    known = architecture_of

    def forget(**changes: Any) -> None:
        monkeypatch.setattr(
            target, "architecture_of", lambda *given: replace(known(*given), config={}, **changes)
        )

    return forget


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"opt-350m", "opt-bare"}))
def test_a_configuration_made_anew_computes_the_same(case, tmp_path, forgetful):
    """Of the architecture and the tensors alone, as of a model from elsewhere."""
    model = model_of(case)
    source = saved(model, tmp_path / "source")
    forgetful()
    copy = loaded(convert(source, tmp_path / "ours"))
    assert equal(copy.state_dict(), model.state_dict())
    assert type(copy) is (transformers.LlamaForCausalLM if case == "mistral" else type(model))
    with torch.no_grad():
        assert torch.equal(copy(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        (
            "opt-350m",
            {},
            "lacks 2 tensors of transformers' OPTForCausalLM: final_norm.bias, final_norm.weight",
        ),
        (
            "llama",
            {"head_size": 8},
            r"attention.q.weight is \[16, 16\], and in transformers' LlamaForCausalLM",
        ),
        ("opt", {"eps": 1e-6}, "has eps 1e-06, and transformers' opt has 1e-05 only"),
        (
            "bloom",
            {"activation": "gelu"},
            "has activation gelu, and transformers' bloom has gelu_new only",
        ),
        (
            "gpt2",
            {"eps": None, "activation": None},
            "does not record its activation, eps; tell with a config.json",
        ),
        (
            "gpt2",
            {"family": "mixture"},
            "is a model of the mixture family, and transformers has gpt2, opt, llama, bloom only",
        ),
    ],
)
def test_what_no_model_of_the_family_computes(case, changes, said, tmp_path, capsys, forgetful):
    source = saved(model_of(case), tmp_path / "source")
    forgetful(**changes)
    refused(source, tmp_path, capsys, said)


def test_tensors_that_a_given_configuration_has_no_place_for(tmp_path, capsys):
    source, config = saved(model_of("qwen2"), tmp_path / "source"), tmp_path / "config.json"
    kind, told = CASES["llama"]
    kind(**told).to_json_file(config)
    refused(
        source,
        tmp_path,
        capsys,
        "has 9 tensors that have no place in transformers' LlamaForCausalLM",
        "--config",
        str(config),
    )


@pytest.mark.parametrize("golden", ["mp1dp3_fp32", "mp2dp2_fp16"])
def test_metaseq_becomes_the_opt_that_it_was_proved_to_be(golden, tmp_path):
    """Shards of metaseq's own run; the logits are those that transformers' OPT computed of what
    metaseq's tools made of them."""
    source = DATA / "metaseq" / golden
    if not list(source.glob("checkpoint_3-*.pt")):
        pytest.skip(
            f"tests/data/metaseq/{golden} is not there: it is written by metaseq itself, which is "
            f"no package"
        )
    ours = convert(source / "checkpoint_3", tmp_path / "ours", "--weights-only")
    truth = np.load(DATA / "alpa" / golden / "oracle_logits.npz")
    with torch.no_grad():
        logits = loaded(ours).float()(torch.tensor(truth["tokens"])).logits.numpy()
    assert np.abs(logits - truth["hf"]).max() < 1e-5 < 0.1 < truth["hf"].std()


def test_a_configuration_of_release_5_is_read(tmp_path):
    """rope_parameters instead of rope_theta and rope_scaling; a pickle in one file, and
    `architectures` left out."""
    golden = DATA / "transformers/llama_hf"
    ours = convert(golden, tmp_path / "ours")
    assert equal(load_file(ours / "model.safetensors"), torch.load(golden / "pytorch_model.bin"))
    known = architecture_of(registry.read(ours))
    assert (
        known.family,
        known.heads,
        known.groups,
        known.head_size,
        known.rope_theta,
        known.rope_scaling,
        known.tied,
    ) == ("llama", 8, 4, 4, 10000.0, None, False)
    assert (ours / "config.json").read_bytes() == (golden / "config.json").read_bytes()


@pytest.mark.parametrize(
    "given",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}},
    ],
)
def test_scaled_rotary_positions_are_told(given):
    model = ModelConfig(
        "here", {"model_type": "llama", "tie_word_embeddings": True, **CASES["llama"][1], **given}
    )
    assert model.architecture.rope_scaling["factor"] == 2.0
    assert model.architecture.rope_theta == (5.0 if "rope_parameters" in given else 10000.0)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("gpt2", ("gpt2", 3, 16, 4, 4, 24, VOCAB, POSITIONS, "gelu_new", 1e-5, True, True)),
        ("opt", ("opt", 3, 16, 4, 4, 24, VOCAB, POSITIONS, "relu", 1e-5, True, True)),
        ("llama", ("llama", 3, 16, 4, 2, 24, VOCAB, POSITIONS, "silu", 1e-6, False, False)),
        ("bloom", ("bloom", 3, 16, 4, 4, 64, VOCAB, None, "gelu_new", 1e-5, True, True)),
    ],
)
def test_what_a_configuration_says(case, expected):
    kind, told = CASES[case]
    known = ModelConfig("here", kind(**told).to_dict()).architecture
    assert (
        known.family,
        known.layers,
        known.hidden,
        known.heads,
        known.groups,
        known.ffn,
        known.vocab,
        known.positions,
        known.activation,
        known.eps,
        known.tied,
        known.bias,
    ) == expected


@pytest.mark.parametrize(
    ("case", "setting", "value"),
    [
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("mistral", "sliding_window", 8),
        ("qwen2", "use_sliding_window", True),
        ("bloom", "apply_residual_connection_post_layernorm", True),
        ("opt", "do_layer_norm_before", False),
    ],
)
def test_settings_unlike_the_familys_are_told(case, setting, value):
    kind, told = CASES[case]
    config = kind(**told).to_dict()
    assert ModelConfig("here", config).unlike == []
    assert ModelConfig("here", {**config, setting: value}).unlike == [f"{setting} {value}"]


def test_the_metadata_is_what_the_library_asks_for(tmp_path):
    ours = convert(saved(model_of("llama"), tmp_path / "source"), tmp_path / "ours")
    assert container.read_metadata(ours / "model.safetensors") == {"format": "pt"}
