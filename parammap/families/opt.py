"""OPT as metaseq has it: a GPT-like decoder, so its canonical names are those of gpt.py, its
arrangements are its own.

A model-parallel part holds k, v and q as one tensor [k; v; q]; a model of a single part may have
them apart. `layer_norm` and `embed_positions` are whole on every part; `ffn_layernorm` (a norm
inside the MLP) is cut as fc1's rows are.

Sources: metaseq main f7ffa5f and 809e49c of 2022-05-09 (models/transformer_decoder.py,
modules/multihead_attention.py, distributed/stitch_fsdp_ckpt.py); ffn_layernorm: earlier branches
(modules/layer_norm.py)."""

from parammap.tensors.arrangement import KVQ, REPLICATED, SHARD_0, SHARD_1, VOCAB

_LAYER = "decoder.layers.{i}."

#: canonical name: (arrangement, metaseq name)
METASEQ = {
    "embedding.word.weight": (VOCAB, "decoder.embed_tokens.weight"),
    "embedding.position.weight": (REPLICATED, "decoder.embed_positions.weight"),
    "embedding.position._float_tensor": (REPLICATED, "decoder.embed_positions._float_tensor"),
    "embedding.norm.{w}": (REPLICATED, "decoder.layernorm_embedding.{w}"),
    "embedding.project_in.{w}": (REPLICATED, "decoder.project_in_dim.{w}"),
    "layers.{i}.input_norm.{w}": (REPLICATED, _LAYER + "self_attn_layer_norm.{w}"),
    "layers.{i}.attention.qkv.{w}": (KVQ, _LAYER + "self_attn.qkv_proj.{w}"),
    "layers.{i}.attention.q.{w}": (SHARD_0, _LAYER + "self_attn.q_proj.{w}"),
    "layers.{i}.attention.k.{w}": (SHARD_0, _LAYER + "self_attn.k_proj.{w}"),
    "layers.{i}.attention.v.{w}": (SHARD_0, _LAYER + "self_attn.v_proj.{w}"),
    "layers.{i}.attention.out.weight": (SHARD_1, _LAYER + "self_attn.out_proj.weight"),
    "layers.{i}.attention.out.bias": (REPLICATED, _LAYER + "self_attn.out_proj.bias"),
    "layers.{i}.post_attention_norm.{w}": (REPLICATED, _LAYER + "final_layer_norm.{w}"),
    "layers.{i}.mlp.fc1.{w}": (SHARD_0, _LAYER + "fc1.{w}"),
    "layers.{i}.mlp.norm.{w}": (SHARD_0, _LAYER + "ffn_layernorm.{w}"),
    "layers.{i}.mlp.fc2.weight": (SHARD_1, _LAYER + "fc2.weight"),
    "layers.{i}.mlp.fc2.bias": (REPLICATED, _LAYER + "fc2.bias"),
    "final_norm.{w}": (REPLICATED, "decoder.layer_norm.{w}"),
    "project_out.{w}": (REPLICATED, "decoder.project_out_dim.{w}"),
    "output.weight": (VOCAB, "decoder.output_projection.weight"),
    "version": (REPLICATED, "decoder.version"),
}

#: what a checkpoint of metaseq's may have without a model computing with it
BUFFERS = frozenset({"version"})

#: the canonical tensors that every model with k, v and q apart has in each layer, and once; one
#: with qkv has gpt.py's
REQUIRED_IN_LAYER = [
    "input_norm.weight",
    "attention.q.weight",
    "attention.k.weight",
    "attention.v.weight",
    "attention.out.weight",
    "post_attention_norm.weight",
    "mlp.fc1.weight",
    "mlp.fc2.weight",
]
REQUIRED = ["embedding.word.weight", "final_norm.weight"]
