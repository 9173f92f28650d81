"""transformers' decoders: GPT-2, OPT, LLaMA-like models and BLOOM, each a table of names without
the base model's prefix, in the order of the library's own state dict.

What is not listed as a tensor but as a buffer is computed by the model itself, and saved by old
releases.

Sources: transformers 4.57 (models/{gpt2,opt,llama,mistral,qwen2,bloom}/modeling_*.py).
GPT-2's linear maps are Conv1D, whose weights are [in, out] (pytorch_utils.py).
"""

from parammap.tensors.arrangement import QKV, REPLICATED, SHARD_0, SHARD_1, STACKED_QKV, VOCAB

TRANSPOSED = "transposed"

GPT2 = {
    "embedding.word.weight": (VOCAB, "wte.weight"),
    "embedding.position.weight": (REPLICATED, "wpe.weight"),
    "layers.{i}.input_norm.{w}": (REPLICATED, "h.{i}.ln_1.{w}"),
    "layers.{i}.attention.qkv.{w}": (STACKED_QKV, "h.{i}.attn.c_attn.{w}", TRANSPOSED),
    "layers.{i}.attention.out.weight": (SHARD_1, "h.{i}.attn.c_proj.weight", TRANSPOSED),
    "layers.{i}.attention.out.bias": (REPLICATED, "h.{i}.attn.c_proj.bias"),
    "layers.{i}.post_attention_norm.{w}": (REPLICATED, "h.{i}.ln_2.{w}"),
    "layers.{i}.mlp.fc1.{w}": (SHARD_0, "h.{i}.mlp.c_fc.{w}", TRANSPOSED),
    "layers.{i}.mlp.fc2.weight": (SHARD_1, "h.{i}.mlp.c_proj.weight", TRANSPOSED),
    "layers.{i}.mlp.fc2.bias": (REPLICATED, "h.{i}.mlp.c_proj.bias"),
    "final_norm.{w}": (REPLICATED, "ln_f.{w}"),
    "output.weight": (VOCAB, "lm_head.weight"),
}

OPT = {
    "embedding.word.weight": (VOCAB, "decoder.embed_tokens.weight"),
    "embedding.position.weight": (REPLICATED, "decoder.embed_positions.weight"),
    "project_out.weight": (REPLICATED, "decoder.project_out.weight"),
    "embedding.project_in.weight": (REPLICATED, "decoder.project_in.weight"),
    "final_norm.{w}": (REPLICATED, "decoder.final_layer_norm.{w}"),
    "layers.{i}.attention.k.{w}": (SHARD_0, "decoder.layers.{i}.self_attn.k_proj.{w}"),
    "layers.{i}.attention.v.{w}": (SHARD_0, "decoder.layers.{i}.self_attn.v_proj.{w}"),
    "layers.{i}.attention.q.{w}": (SHARD_0, "decoder.layers.{i}.self_attn.q_proj.{w}"),
    "layers.{i}.attention.out.weight": (SHARD_1, "decoder.layers.{i}.self_attn.out_proj.weight"),
    "layers.{i}.attention.out.bias": (REPLICATED, "decoder.layers.{i}.self_attn.out_proj.bias"),
    "layers.{i}.input_norm.{w}": (REPLICATED, "decoder.layers.{i}.self_attn_layer_norm.{w}"),
    "layers.{i}.mlp.fc1.{w}": (SHARD_0, "decoder.layers.{i}.fc1.{w}"),
    "layers.{i}.mlp.fc2.weight": (SHARD_1, "decoder.layers.{i}.fc2.weight"),
    "layers.{i}.mlp.fc2.bias": (REPLICATED, "decoder.layers.{i}.fc2.bias"),
    "layers.{i}.post_attention_norm.{w}": (REPLICATED, "decoder.layers.{i}.final_layer_norm.{w}"),
    "output.weight": (VOCAB, "lm_head.weight"),
}

LLAMA = {
    "embedding.word.weight": (VOCAB, "embed_tokens.weight"),
    "layers.{i}.attention.q.{w}": (SHARD_0, "layers.{i}.self_attn.q_proj.{w}"),
    "layers.{i}.attention.k.{w}": (SHARD_0, "layers.{i}.self_attn.k_proj.{w}"),
    "layers.{i}.attention.v.{w}": (SHARD_0, "layers.{i}.self_attn.v_proj.{w}"),
    "layers.{i}.attention.out.weight": (SHARD_1, "layers.{i}.self_attn.o_proj.weight"),
    "layers.{i}.attention.out.bias": (REPLICATED, "layers.{i}.self_attn.o_proj.bias"),
    "layers.{i}.attention.q_norm.weight": (REPLICATED, "layers.{i}.self_attn.q_norm.weight"),
    "layers.{i}.attention.k_norm.weight": (REPLICATED, "layers.{i}.self_attn.k_norm.weight"),
    "layers.{i}.mlp.gate.{w}": (SHARD_0, "layers.{i}.mlp.gate_proj.{w}"),
    "layers.{i}.mlp.up.{w}": (SHARD_0, "layers.{i}.mlp.up_proj.{w}"),
    "layers.{i}.mlp.fc2.weight": (SHARD_1, "layers.{i}.mlp.down_proj.weight"),
    "layers.{i}.mlp.fc2.bias": (REPLICATED, "layers.{i}.mlp.down_proj.bias"),
    "layers.{i}.input_norm.weight": (REPLICATED, "layers.{i}.input_layernorm.weight"),
    "layers.{i}.post_attention_norm.weight": (
        REPLICATED,
        "layers.{i}.post_attention_layernorm.weight",
    ),
    "final_norm.weight": (REPLICATED, "norm.weight"),
    "output.weight": (VOCAB, "lm_head.weight"),
}

BLOOM = {
    "embedding.word.weight": (VOCAB, "word_embeddings.weight"),
    "embedding.norm.{w}": (REPLICATED, "word_embeddings_layernorm.{w}"),
    "layers.{i}.input_norm.{w}": (REPLICATED, "h.{i}.input_layernorm.{w}"),
    "layers.{i}.attention.qkv.{w}": (QKV, "h.{i}.self_attention.query_key_value.{w}"),
    "layers.{i}.attention.out.weight": (SHARD_1, "h.{i}.self_attention.dense.weight"),
    "layers.{i}.attention.out.bias": (REPLICATED, "h.{i}.self_attention.dense.bias"),
    "layers.{i}.post_attention_norm.{w}": (REPLICATED, "h.{i}.post_attention_layernorm.{w}"),
    "layers.{i}.mlp.fc1.{w}": (SHARD_0, "h.{i}.mlp.dense_h_to_4h.{w}"),
    "layers.{i}.mlp.fc2.weight": (SHARD_1, "h.{i}.mlp.dense_4h_to_h.weight"),
    "layers.{i}.mlp.fc2.bias": (REPLICATED, "h.{i}.mlp.dense_4h_to_h.bias"),
    "final_norm.{w}": (REPLICATED, "ln_f.{w}"),
    "output.weight": (VOCAB, "lm_head.weight"),
}

#: prefix of the base model, which lm_head.weight does not have
PREFIX = {"gpt2": "transformer.", "opt": "model.", "llama": "model.", "bloom": "transformer."}
#: ends of the names of buffers that old releases saved
BUFFERS = {
    "gpt2": (".attn.bias", ".attn.masked_bias"),
    "opt": (),
    "llama": (".rotary_emb.inv_freq",),
    "bloom": (),
}

_ATTENTION = [
    "input_norm.weight",
    *(f"attention.{part}.weight" for part in ("q", "k", "v", "out")),
    "post_attention_norm.weight",
]
#: for models that no other family's lists fit, those of LLaMA and of OPT with projections: the
#: canonical tensors that every one has once, and in each layer
REQUIRED = [
    (
        ["embedding.word.weight", "final_norm.weight"],
        [*_ATTENTION, "mlp.gate.weight", "mlp.up.weight", "mlp.fc2.weight"],
    ),
    (
        ["embedding.word.weight", "embedding.project_in.weight", "project_out.weight"],
        [*_ATTENTION, "mlp.fc1.weight", "mlp.fc2.weight"],
    ),
]
