"""OPT: GPT-2's norms and learned positions, of which the table has rows of padding before the
first; ReLU. metaseq trained it.

A model-parallel part of metaseq's holds k, v and q as one tensor [k; v; q]; a model of a single
part may have them apart. `layer_norm` and `embed_positions` are whole on every part;
`ffn_layernorm` (a norm inside the MLP) is cut as fc1's rows are.

Sources: metaseq main f7ffa5f and 809e49c of 2022-05-09 (models/transformer_decoder.py,
modules/multihead_attention.py, modules/learned_positional_embedding.py,
distributed/stitch_fsdp_ckpt.py); ffn_layernorm: earlier branches (modules/layer_norm.py);
transformers 4.57 (models/opt)."""

from collections.abc import Mapping
from typing import Any

from parammap.families import decoder
from parammap.families.family import (
    LAYER_NORM,
    LEARNED,
    Cell,
    Config,
    Family,
    ModelType,
    in_layer,
    row,
)
from parammap.tensors.arrangement import KVQ, REPLICATED, SHARD_0, SHARD_1, VOCAB

#: what a checkpoint of metaseq's may have without a model computing with it
BUFFERS = frozenset({"version"})


def _is_projected(said: Mapping[str, Any]) -> bool:
    columns = said.get("word_embed_proj_dim", said["hidden_size"])
    return bool(columns != said["hidden_size"])


def _both(name: str) -> dict[str, str]:
    """A name that metaseq and transformers share."""
    return {"metaseq": name, "transformers": name}


_LAYER = _both("decoder.layers.{i}.")
OPT = Family(
    name="opt",
    title="OPT",
    rows=(
        row("embedding.word.weight", VOCAB, **_both("decoder.embed_tokens.weight")),
        row("embedding.position.weight", REPLICATED, **_both("decoder.embed_positions.weight")),
        row(
            "project_out.weight",
            REPLICATED,
            metaseq="decoder.project_out_dim.weight",
            transformers="decoder.project_out.weight",
        ),
        row(
            "embedding.project_in.weight",
            REPLICATED,
            metaseq="decoder.project_in_dim.weight",
            transformers="decoder.project_in.weight",
        ),
        row(
            "final_norm.{w}",
            REPLICATED,
            metaseq="decoder.layer_norm.{w}",
            transformers="decoder.final_layer_norm.{w}",
        ),
        *in_layer(
            _LAYER,
            row("attention.qkv.{w}", metaseq=Cell("self_attn.qkv_proj.{w}", KVQ)),
            row("attention.k.{w}", SHARD_0, **_both("self_attn.k_proj.{w}")),
            row("attention.v.{w}", SHARD_0, **_both("self_attn.v_proj.{w}")),
            row("attention.q.{w}", SHARD_0, **_both("self_attn.q_proj.{w}")),
            row("attention.out.weight", SHARD_1, **_both("self_attn.out_proj.weight")),
            row("attention.out.bias", REPLICATED, **_both("self_attn.out_proj.bias")),
            row("input_norm.{w}", REPLICATED, **_both("self_attn_layer_norm.{w}")),
            row("mlp.fc1.{w}", SHARD_0, **_both("fc1.{w}")),
            row("mlp.norm.{w}", SHARD_0, metaseq="ffn_layernorm.{w}"),
            row("mlp.fc2.weight", SHARD_1, **_both("fc2.weight")),
            row("mlp.fc2.bias", REPLICATED, **_both("fc2.bias")),
            row("post_attention_norm.{w}", REPLICATED, **_both("final_layer_norm.{w}")),
        ),
        row(
            "output.weight",
            VOCAB,
            metaseq="decoder.output_projection.weight",
            transformers="lm_head.weight",
        ),
        row("embedding.norm.{w}", REPLICATED, metaseq="decoder.layernorm_embedding.{w}"),
        row("embedding.project_in.bias", REPLICATED, metaseq="decoder.project_in_dim.bias"),
        row("project_out.bias", REPLICATED, metaseq="decoder.project_out_dim.bias"),
        row(
            "embedding.position._float_tensor",
            REPLICATED,
            metaseq="decoder.embed_positions._float_tensor",
        ),
        row("version", REPLICATED, metaseq="decoder.version"),
    ),
    together=(decoder.QKV_APART, *decoder.TOGETHER),
    buffers=BUFFERS,
    rows_before_positions=2,
    norm=LAYER_NORM,
    positions=LEARNED,
    config=Config(
        prefix="model.",
        settings={
            "layers": ("num_hidden_layers",),
            "hidden": ("hidden_size",),
            "heads": ("num_attention_heads",),
            "vocab": ("vocab_size",),
            "positions": ("max_position_embeddings",),
            "tied": ("tie_word_embeddings",),
            "ffn": ("ffn_dim",),
            "activation": ("activation_function",),
        },
        constant={"eps": 1e-5},
        sizes={"words": "word_embed_proj_dim"},
        shapes={"embedding.project_in": ("hidden", "words"), "project_out": ("words", "hidden")},
        types={
            "opt": ModelType(
                "OPTForCausalLM",
                "OPTModel",
                {
                    "tie_word_embeddings": True,
                    "activation_function": "relu",
                    "do_layer_norm_before": True,
                    "enable_bias": True,
                    "_remove_final_layer_norm": False,
                    "layer_norm_elementwise_affine": True,
                },
                {
                    r"project_(in|out)\.": _is_projected,
                    r"^final_norm\.": lambda said: (
                        said["do_layer_norm_before"] and not said["_remove_final_layer_norm"]
                    ),
                    r"norm\.": lambda said: said["layer_norm_elementwise_affine"],
                    r"\.(attention|mlp)\.\w+\.bias$": lambda said: said["enable_bias"],
                },
                as_family={
                    "do_layer_norm_before": True,
                    "_remove_final_layer_norm": False,
                    "enable_bias": True,
                    "layer_norm_elementwise_affine": True,
                },
                from_tensors={"enable_bias": "layers.0.mlp.fc2.bias"},
                fixed={"do_layer_norm_before": True},
            )
        },
    ),
)
