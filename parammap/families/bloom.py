"""BLOOM: ALiBi, and a norm on the embedding. Megatron-DeepSpeed trained it.

Source: transformers 4.57 (models/bloom)."""

from parammap.families import decoder
from parammap.families.family import (
    ALIBI,
    LAYER_NORM,
    Cell,
    Config,
    Family,
    ModelType,
    in_layer,
    row,
)
from parammap.tensors.arrangement import REPLICATED, SHARD_0

BLOOM = Family(
    name="bloom",
    title="BLOOM",
    rows=(
        row("embedding.word.weight", transformers="word_embeddings.weight"),
        row(
            "embedding.norm.{w}",
            REPLICATED,
            transformers="word_embeddings_layernorm.{w}",
            deepspeed="embedding.word_embeddings.norm.{w}",
        ),
        *in_layer(
            {"transformers": "h.{i}."},
            row("input_norm.{w}", transformers="input_layernorm.{w}"),
            row("attention.qkv.{w}", transformers="self_attention.query_key_value.{w}"),
            row("attention.out.{w}", transformers="self_attention.dense.{w}"),
            row("post_attention_norm.{w}", transformers="post_attention_layernorm.{w}"),
            row("mlp.fc1.{w}", transformers=Cell("mlp.dense_h_to_4h.{w}", SHARD_0)),
            row("mlp.fc2.{w}", transformers="mlp.dense_4h_to_h.{w}"),
        ),
        row("final_norm.{w}", transformers="ln_f.{w}"),
        row("output.weight", transformers="lm_head.weight"),
    ),
    shares=(decoder.MEGATRON_DEEPSPEED,),
    together=decoder.TOGETHER,
    norm=LAYER_NORM,
    positions=ALIBI,
    config=Config(
        prefix="transformer.",
        settings={
            "layers": ("n_layer", "num_hidden_layers"),
            "hidden": ("hidden_size", "n_embed"),
            "heads": ("n_head", "num_attention_heads"),
            "vocab": ("vocab_size",),
            "eps": ("layer_norm_epsilon",),
            "tied": ("tie_word_embeddings",),
        },
        constant={"activation": "gelu_new"},
        types={
            "bloom": ModelType(
                "BloomForCausalLM",
                "BloomModel",
                defaults={"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5},
                as_family={"apply_residual_connection_post_layernorm": False},
            )
        },
    ),
)
