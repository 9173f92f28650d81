"""What is said of a model: by Megatron-LM's arguments, metaseq's settings, Alpa's folder; and what
is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from parammap.cli.main import main
from parammap.errors import RefusedError
from parammap.families import GPT2, LLAMA, OPT
from parammap.frameworks import registry
from parammap.frameworks.architecture import architecture_of
from tests.support import paths
from tests.support.alpa import opt_weights, singleton

DATA = paths.TESTS / "data"
GPT = DATA / "megatron/core_r0.12.0_repo_mcore_tp2pp2_hook"
LEGACY = DATA / "megatron/cac60ce4_patched_legacy_tp2pp2"
MOE = DATA / "megatron/cac60ce4_patched_mcore_moe_ep2dp2"
NORMS_AND_GATES = DATA / "megatron/cac60ce4_mcore_pp2dp2_llama"
LLAMA_TINY = {
    "tp": 2,
    "pp": 2,
    "layers": 2,
    "hidden": 64,
    "heads": 4,
    "dtype": "bf16",
    "rmsnorm": True,
    "swiglu": True,
    "rope": True,
    "no_bias": True,
}


def read(folder: Path, **arguments: object):
    """A Megatron checkpoint whose run had these arguments."""
    checkpoint = registry.read(folder, weights_only=True)
    for meta in checkpoint.rank_metadata.values():
        meta["args"] = replace(meta["args"], state={**meta["args"].state, **arguments})
    return checkpoint


def test_a_gpt_by_its_own_arguments():
    found = architecture_of(read(GPT))
    assert (found.family, found.layers, found.hidden, found.heads, found.groups, found.ffn) == (
        GPT2,
        2,
        128,
        4,
        4,
        512,
    )
    assert (found.vocab, found.positions, found.head_size, found.eps) == (128, 32, 32, 1e-5)
    assert (found.tied, found.bias, found.rope_theta, found.rope_scaling) == (
        True,
        True,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("folder", "arguments", "activation"),
    [
        (GPT, {}, "gelu"),
        (GPT, {"bias_gelu_fusion": True}, "gelu_new"),
        (GPT, {"use_te_activation_func": True}, "gelu_new"),
        (GPT, {"openai_gelu": True}, "gelu"),  # megatron-core never reads it
        (LEGACY, {}, "gelu"),
        (LEGACY, {"bias_gelu_fusion": True}, "gelu_new"),
        (LEGACY, {"openai_gelu": True}, "gelu_new"),
        (LEGACY, {"onnx_safe": True, "bias_gelu_fusion": True}, "gelu"),
    ],
)
def test_which_gelu(folder, arguments, activation):
    assert architecture_of(read(folder, **arguments)).activation == activation


def test_a_llama_by_its_own_arguments(trained):
    found = architecture_of(read(trained(**LLAMA_TINY).path))
    assert (found.family, found.activation, found.rope_theta, found.positions) == (
        LLAMA,
        "silu",
        10000.0,
        32,
    )
    assert (found.vocab, found.bias, found.head_size, found.rope_scaling) == (250, False, 16, None)


@pytest.mark.parametrize(
    ("arguments", "scaling"),
    [
        ({"rotary_seq_len_interpolation_factor": 4}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"use_rope_scaling": True},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
)
def test_stretched_rotary_positions(trained, arguments, scaling):
    found = architecture_of(read(trained(**LLAMA_TINY).path, rotary_base=500_000, **arguments))
    assert (found.rope_theta, found.rope_scaling) == (500_000.0, scaling)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"squared_relu": True}, "was trained with squared_relu True"),
        ({"apply_layernorm_1p": True}, "was trained with apply_layernorm_1p True"),
        ({"softmax_type": "learnable"}, "was trained with softmax_type learnable"),
        ({"position_embedding_type": "relative"}, "its positions are relative"),
        (
            {"position_embedding_type": "rope"},
            "is neither like GPT-2.*nor like LLaMA.*: it has norms with biases, not a gated",
        ),
    ],
)
def test_a_gpt_that_computes_otherwise_is_refused(arguments, message):
    with pytest.raises(RefusedError, match=message):
        architecture_of(read(GPT, **arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotary_percent": 0.5}, "rotates only a part of each head .rotary_percent 0.5"),
        ({"rotary_interleaved": True}, "rotates neighbouring elements"),
        ({"quick_geglu": True}, "was trained with quick_geglu True"),
        ({"position_embedding_type": "none"}, "its positions are none"),
    ],
)
def test_a_llama_that_computes_otherwise_is_refused(trained, arguments, message):
    with pytest.raises(RefusedError, match=message):
        architecture_of(read(trained(**LLAMA_TINY).path, **arguments))


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (MOE, "was trained with num_experts 4"),
        (
            NORMS_AND_GATES,
            "it has norms with biases, a gated MLP, not a table of positions, rotary positions",
        ),
        (DATA / "yuan/tp1pp4_blocks1221", "was trained with use_lf_gate True"),
    ],
)
def test_models_of_no_common_family_are_refused(folder, message):
    with pytest.raises(RefusedError, match=message):
        architecture_of(registry.read(folder, weights_only=True))


def test_a_model_without_arguments_tells_what_its_tensors_do():
    found = architecture_of(registry.read(DATA / "transformers/llama_tp2pp2", weights_only=True))
    assert (found.family, found.layers, found.hidden, found.ffn, found.vocab) == (
        LLAMA,
        4,
        32,
        48,
        96,
    )
    assert {found.heads, found.eps, found.activation, found.rope_theta, found.tied} == {None}


def test_the_users_word_counts_where_nothing_is_recorded(trained):
    bare = registry.read(DATA / "transformers/llama_tp2pp2", weights_only=True)
    assert architecture_of(bare, "silu").activation == "silu"
    assert architecture_of(read(GPT), "gelu").activation == "gelu"
    with pytest.raises(
        RefusedError, match="its activation is gelu and not relu; leave --activation out"
    ):
        architecture_of(read(GPT), "relu")


def test_an_opt_of_metaseq_and_of_alpa(tmp_path):
    source = singleton(tmp_path, opt_weights(), activation_fn="relu", decoder_learned_pos=True)
    of_metaseq = architecture_of(registry.read(source))
    assert (of_metaseq.family, of_metaseq.layers, of_metaseq.hidden, of_metaseq.heads) == (
        OPT,
        3,
        24,
        4,
    )
    assert (of_metaseq.ffn, of_metaseq.vocab, of_metaseq.positions, of_metaseq.head_size) == (
        40,
        64,
        32,
        6,
    )
    assert (of_metaseq.activation, of_metaseq.eps, of_metaseq.tied) == ("relu", 1e-5, True)
    assert main(["convert", str(source), str(tmp_path / "np"), "--to", "alpa"]) == 0
    assert architecture_of(registry.read(tmp_path / "np")) == of_metaseq
    (tmp_path / "np/parammap_manifest.json").unlink()
    alone = architecture_of(registry.read(tmp_path / "np"))
    assert alone == replace(of_metaseq, heads=None, groups=None, head_size=None)


def test_a_public_opt_has_its_public_heads(tmp_path):
    for name, weight in opt_weights(torch.int8, layers=12, hidden=768, ffn=8, vocab=16).items():
        with open(tmp_path / name, "wb") as file:
            np.save(file, np.zeros(weight.shape, np.float16))
    assert architecture_of(registry.read(tmp_path)).heads == 12


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"alibi": True}, "was trained with alibi True"),
        ({"disable_bias": True}, "was trained with disable_bias True"),
        (
            {"activation_fn": "gelu"},
            "its activation is gelu, which OPT has not, or metaseq's releases compute differently",
        ),
    ],
)
def test_a_metaseq_model_that_is_no_opt_is_refused(tmp_path, model, message):
    with pytest.raises(RefusedError, match=message):
        architecture_of(registry.read(singleton(tmp_path, opt_weights(), **model)))
