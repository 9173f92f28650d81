"""Tiny models of transformers' own, their folders, and what converting these gives."""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_utils import no_init_weights

from parammap.cli.main import main
from parammap.frameworks import registry
from parammap.proof import verify

DATA = Path(__file__).parent.parent / "data"
VOCAB, POSITIONS = 40, 16
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_ROTARY = {**_SIZES, "intermediate_size": 24, "num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": POSITIONS,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 24,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_OPT = {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}
_BLOOM = {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": 3, "n_head": 4}
#: the configuration's class and what it is told
CASES: dict[str, tuple[Any, dict]] = {
    "gpt2": (transformers.GPT2Config, _GPT2),
    "gpt2-untied": (
        transformers.GPT2Config,
        {**_GPT2, "tie_word_embeddings": False, "n_inner": None},
    ),
    "opt": (transformers.OPTConfig, _OPT),
    "opt-350m": (
        transformers.OPTConfig,
        {**_OPT, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    ),
    "opt-bare": (
        transformers.OPTConfig,
        {**_OPT, "enable_bias": False, "layer_norm_elementwise_affine": False},
    ),
    "llama": (transformers.LlamaConfig, _ROTARY),
    "llama-biased": (
        transformers.LlamaConfig,
        {
            **_ROTARY,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 8,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": (transformers.MistralConfig, {**_ROTARY, "sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, _ROTARY),
    "qwen3": (transformers.Qwen3Config, {**_ROTARY, "head_dim": 8, "tie_word_embeddings": True}),
    "bloom": (transformers.BloomConfig, _BLOOM),
}
TOKENS = torch.arange(24).reshape(2, 12) % VOCAB


def model_of(case: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model of which no two values are equal, norms and biases included."""
    kind, told = CASES[case]
    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(kind(**told)).eval()
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1)
            )
    return model.to(dtype)


def saved(model: Any, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    return folder


def convert(source: Path, out: Path, *flags: str) -> Path:
    assert (
        main(["convert", str(source), str(out), "--to", "transformers", "--workers", "1", *flags])
        == 0
    )
    return out


def loaded(folder: Path, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    """The model that the library makes of a folder, with nothing missing or left over."""
    model, told = kind.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(told.values()), told
    return model.eval()


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == value.dtype and torch.equal(ours[name], value)
        for name, value in theirs.items()
    )


def digests(folder: Path, **reading: Any) -> dict:
    summed = verify.digests(registry.read(folder, **reading).index, 1)
    return {
        (tensor.state, tensor.name, tensor.dtype, tensor.shape): set(one.digests)
        for tensor, one in summed.items()
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name != "parammap_manifest.json"
    }


def edit(path: Path, **changes: Any) -> None:
    """Change settings of a JSON file; None takes one away."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(
        json.dumps({name: value for name, value in content.items() if value is not None})
    )


def refused(folder: Path, tmp_path: Path, capsys, said: str, *flags: str) -> None:
    """One line, status 2, and nothing written, on any level."""
    capsys.readouterr()
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert (
        main(["convert", str(folder), str(tmp_path / "out"), "--to", "transformers", *flags]) == 2
    )
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(said, error), error
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


#: what the run of llama_tp2pp2 was told, as far as its layout goes, and how it computes
LAID_OUT = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "num_layers": 4,
    "num_attention_heads": 8,
    "group_query_attention": True,
    "num_query_groups": 4,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
}
COMPUTED = {
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "swiglu": True,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "norm_epsilon": 1e-5,
    "max_position_embeddings": 16,
    "add_bias_linear": False,
    "normalization": "RMSNorm",
}


def megatron(folder: Path, **args: Any) -> Path:
    """megatron-core's own LLaMA, tp 2 · pp 2, which has no arguments, with these."""
    shutil.copytree(DATA / "transformers/llama_tp2pp2", folder, dirs_exist_ok=True)
    for path in folder.glob("iter_*/*/model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        torch.save({**content, "args": argparse.Namespace(**args)}, path)
    return folder
