"""Alpa's serving weights: the very files that metaseq's and Alpa's own tools make, and a model that
computes the same."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from parammap.cli.main import main
from parammap.errors import RefusedError
from parammap.execute.local import run_tasks
from parammap.execute.progress import Progress
from parammap.frameworks import registry
from parammap.frameworks.alpa import serving as alpa
from parammap.frameworks.architecture import architecture_of
from parammap.plan.planner import Planner
from parammap.tensors.logical import MAIN_PARAM, MODEL_PARAM
from tests.support import alpa_opt, hub, paths
from tests.support.alpa import (
    FFN,
    GPT,
    HEADS,
    HIDDEN,
    LAYERS,
    POSITIONS,
    VOCAB,
    opt_weights,
    singleton,
)

DATA = paths.TESTS / "data"
SERVED = alpa.Options()


def convert(source: Path, out: Path, options: alpa.Options = SERVED, **reading) -> dict:
    """Write the folder; the notes of the output."""
    checkpoint = registry.read(source, **reading)
    output = alpa.output(checkpoint, options)
    plan = Planner(checkpoint.index, {MAIN_PARAM: MODEL_PARAM}).plan(output.files)
    out.mkdir(parents=True)
    assert not [
        name for name in plan.unused if name.endswith(f"({MAIN_PARAM})") and ".padding" not in name
    ]
    assert len(list(run_tasks(plan.tasks, out, 1, Progress(1)))) == len(output.files)
    return output.notes["alpa"]


@pytest.mark.parametrize("golden", ["mp2dp2_fp16", "mp1dp3_fp32"])
def test_shards_become_the_files_that_the_existing_tools_make(golden, tmp_path):
    """metaseq's shards, reshard_fsdp and reshard_mp's singleton, and what Alpa's step_3 made of it;
    and the logits that metaseq, HF's OPT and Alpa's own flax model computed of them."""
    shards, folder = DATA / "metaseq" / golden, DATA / "alpa" / golden
    if not list(shards.glob("checkpoint_3-*.pt")):
        pytest.skip(
            f"tests/data/metaseq/{golden} is not there: it is written by metaseq itself, which is "
            f"no package"
        )
    convert(
        shards / "checkpoint_3",
        tmp_path / "np",
        alpa.Options(dtype="float16" if "fp16" in golden else "float32"),
    )
    with zipfile.ZipFile(folder / "alpa_np.zip") as archive:
        theirs = {name: archive.read(name) for name in archive.namelist()}
    assert (
        theirs == {path.name: path.read_bytes() for path in (tmp_path / "np").iterdir()}
        and len(theirs) == 53
    )
    truth, sizes = (
        np.load(folder / "oracle_logits.npz"),
        json.loads((folder / "golden.json").read_text()),
    )
    params = alpa_opt.fused(tmp_path / "np", sizes["layers"])
    logits = alpa_opt.logits(params, truth["tokens"], sizes["layers"], sizes["heads"])
    assert np.abs(logits - truth["alpa"]).max() < 1e-5 and np.abs(logits - truth["hf"]).max() < 1e-5
    assert truth["alpa"].std() > 0.1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("saved", [torch.float32, torch.float16, torch.bfloat16])
def test_each_file_is_what_numpy_saves(dtype, saved, tmp_path):
    weights = opt_weights(saved)
    convert(singleton(tmp_path, weights), tmp_path / "np", alpa.Options(dtype=dtype))
    assert {path.name for path in (tmp_path / "np").iterdir()} == set(weights)
    for name, value in weights.items():
        np.save(tmp_path / "expected.npy", value.float().numpy().astype(dtype))
        assert (tmp_path / "np" / name).read_bytes() == (tmp_path / "expected.npy").read_bytes(), (
            name
        )


def test_the_model_computes_hfs_logits(tmp_path):
    """Weights of HF's OPT as metaseq names them, converted, fused as Alpa's loader does, and
    computed."""
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers (pip install 'parammap[dev]')"
    )
    config = transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS - 2,
        init_std=0.2,
        bos_token_id=2,
    )
    torch.manual_seed(3)
    model = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # fresh biases are 0 and norms are 1
    weights = {
        name.removeprefix("model.").replace("decoder.final_layer_norm", "decoder.layer_norm"): value
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    convert(singleton(tmp_path, weights), tmp_path / "np", alpa.Options(dtype="float32"))
    tokens = torch.randint(2, VOCAB, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits.numpy()
    params = alpa_opt.fused(tmp_path / "np", LAYERS)
    assert (
        np.abs(alpa_opt.logits(params, tokens.numpy(), LAYERS, HEADS) - expected).max()
        < 1e-5
        < expected.std()
    )
    kernel = "params.transformers.encoder.1.attention.self.qkv_combined.kernel"
    params[kernel] = (
        params[kernel].reshape(HIDDEN, HIDDEN, 3)[..., [0, 2, 1]].reshape(HIDDEN, -1)
    )  # k for v
    assert np.abs(alpa_opt.logits(params, tokens.numpy(), LAYERS, HEADS) - expected).max() > 0.1


def test_a_longer_vocabulary_repeats_the_last_row(tmp_path):
    weights = opt_weights()
    notes = convert(
        singleton(tmp_path, weights),
        tmp_path / "np",
        alpa.Options(dtype="float32", vocab_size=VOCAB + 8),
    )
    words = np.load(tmp_path / "np/decoder.embed_tokens.weight")
    given = weights["decoder.embed_tokens.weight"].numpy()
    assert np.array_equal(words[:VOCAB], given) and np.array_equal(
        words[VOCAB:], np.repeat(given[-1:], 8, 0)
    )
    assert (notes["vocab_size"], notes["vocab_rows_added"]) == (VOCAB + 8, 8)


def test_a_vocabulary_is_never_cut(tmp_path):
    with pytest.raises(
        RefusedError, match="has a vocabulary of 64, of which 63 rows would cut off a part"
    ):
        convert(singleton(tmp_path, opt_weights()), tmp_path / "np", alpa.Options(vocab_size=63))


def test_a_public_model_has_the_servers_vocabulary(tmp_path):
    source = singleton(
        tmp_path, opt_weights(torch.float16, layers=12, hidden=768, ffn=8, vocab=104)
    )
    with pytest.raises(
        RefusedError, match="has 104 rows of vocabulary, and llm_serving's opt-125m takes 50272"
    ):
        convert(source, tmp_path / "np")
    convert(source, tmp_path / "np", alpa.Options(vocab_size=104))
    assert np.load(tmp_path / "np/decoder.embed_tokens.weight").shape == (104, 768)


def test_a_bloom_is_served_under_transformers_names(tmp_path):
    """Each parameter of transformers' BLOOM, whole and as it is, in a file of its own name; and
    back."""
    source = hub.save("bloom", tmp_path / "hf")
    assert (
        main(["convert", str(source), str(tmp_path / "np"), "--to", "alpa", "--dtype", "float32"])
        == 0
    )
    expected = hub.model("bloom").transformer.state_dict()
    assert {path.name for path in (tmp_path / "np").iterdir()} - {"parammap_manifest.json"} == set(
        expected
    )
    for name, value in expected.items():
        assert np.array_equal(np.load(tmp_path / "np" / name), value.numpy()), name
    known = architecture_of(registry.read(tmp_path / "np"))
    assert (known.family, known.heads, known.activation, known.positions) == (
        "bloom",
        4,
        "gelu_new",
        None,
    )
    assert (
        main(["convert", str(tmp_path / "np"), str(tmp_path / "back"), "--to", "transformers"]) == 0
    )
    assert hub.logits(tmp_path / "back").equal(hub.logits(source))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": False}, "cannot be Alpa's BLOOM: has, unlike it, output.weight"),
        (
            {"layer_norm_epsilon": 1e-6},
            "cannot be Alpa's BLOOM: its norms have eps 1e-06 and not 1e-05",
        ),
        ({"apply_residual_connection_post_layernorm": True}, "which Alpa's BLOOM does not compute"),
    ],
)
def test_another_bloom_is_refused(tmp_path, capsys, changes, message):
    source = hub.save("bloom", tmp_path / "hf", **changes)
    assert main(["convert", str(source), str(tmp_path / "np"), "--to", "alpa"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "np").exists()


REFUSED = {  # tensors replaced, added or (None) left out; settings; message
    "no final norm": (
        {"layer_norm.weight": None, "layer_norm.bias": None},
        {},
        "1 tensors are missing: final_norm.weight; copy the whole checkpoint",
    ),
    "sinusoidal positions": (
        {"embed_positions.weight": None, "embed_positions._float_tensor": torch.zeros(1)},
        {},
        "lacks 1 tensors of Alpa's OPT: embedding.position.weight",
    ),
    "an untied head": (
        {"output_projection.weight": torch.zeros(VOCAB, HIDDEN)},
        {"share_decoder_input_output_embed": False},
        "has 1 tensors that have no place in Alpa's OPT",
    ),
    "a norm on the embedding": (
        {"layernorm_embedding.weight": torch.ones(HIDDEN)},
        {},
        "has 1 tensors that have no place in Alpa's OPT: embedding.norm.weight",
    ),
    "a narrow embedding": (
        {"embed_tokens.weight": torch.zeros(VOCAB, 12)},
        {},
        "cannot be Alpa's OPT: its embedding has 12 columns and its layers 24",
    ),
    "gelu": ({}, {"activation_fn": "gelu"}, "its activation is gelu, which OPT has not"),
    "a scaled embedding": (
        {},
        {"no_scale_embedding": False},
        "it was trained with no_scale_embedding False",
    ),
    "alibi": ({}, {"alibi": True}, "it was trained with alibi True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_architectures_are_refused(case, tmp_path):
    changed, model, message = REFUSED[case]
    weights = opt_weights() | {f"decoder.{name}": value for name, value in changed.items()}
    source = singleton(
        tmp_path, {name: value for name, value in weights.items() if value is not None}, **model
    )
    with pytest.raises(RefusedError, match=message):
        convert(source, tmp_path / "np")
    assert not (tmp_path / "np").exists()


def test_numpy_has_no_bfloat16(tmp_path):
    with pytest.raises(
        RefusedError, match="numpy has no bfloat16; choose another dtype with --dtype"
    ):
        convert(singleton(tmp_path, opt_weights()), tmp_path / "np", alpa.Options(dtype="bfloat16"))


def test_a_megatron_gpt_has_another_activation(trained, tmp_path):
    run = trained(**GPT)
    with pytest.raises(
        RefusedError, match="cannot be Alpa's OPT: its activation is gelu and not relu"
    ):
        convert(run.path, tmp_path / "np")


def test_a_llama_has_other_tensors(trained, tmp_path):
    run = trained(**GPT, rmsnorm=True, swiglu=True, rope=True, no_bias=True)
    with pytest.raises(
        RefusedError, match="tensors of Alpa's OPT.*; the two models are of different architectures"
    ):
        convert(run.path, tmp_path / "np")


def test_a_megatron_gpt_of_the_same_architecture(trained, tmp_path):
    """A script around bare megatron-core records no arguments, so that its user must say what its
    activation is."""
    run = trained(**GPT, no_args=True)
    with pytest.raises(
        RefusedError, match="it does not say what its activation is; tell with --activation"
    ):
        convert(run.path, tmp_path / "refused")
    convert(run.path, tmp_path / "np", alpa.Options(dtype="float32", activation="relu"))
    by_place = {truth.place[:2]: truth for truth in run.truths()}
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    pieces = [by_place[tp, 1].array(0, name, "main").reshape(2, 3, 16, 64) for tp in range(2)]
    for number, atom in enumerate("qkv"):
        there = np.load(tmp_path / f"np/decoder.layers.1.self_attn.{atom}_proj.weight")
        assert np.array_equal(
            there, np.concatenate([piece[:, number].reshape(32, 64) for piece in pieces])
        )
    positions = np.load(tmp_path / "np/decoder.embed_positions.weight")
    assert not positions[:2].any()
    assert np.array_equal(
        positions[2:], by_place[0, 0].array(0, "embedding.position_embeddings.weight", "main")
    )
    words = np.load(tmp_path / "np/decoder.embed_tokens.weight")
    assert np.array_equal(
        words,
        np.concatenate(
            [
                by_place[tp, 0].array(0, "embedding.word_embeddings.weight", "main")
                for tp in range(2)
            ]
        ),
    )
