"""Megatron-DeepSpeed's pipeline models, GPT and BLOOM, under the names that their modules have
without the pipeline.

A pipeline names a parameter by the number of its layer function and its name there:
`4.mlp.dense_h_to_4h.weight`; readers and writers exchange that for `layers.{i}.…`, `embedding.…`
and `final_norm.…`, and for `word_embeddings_for_head.weight`, the last stage's copy of the word
embedding, which is the head of every such model.

Source: bigscience-workshop/Megatron-DeepSpeed main (megatron/model/gpt_model.py, GPTModelPipe;
transformer.py)."""

from parammap.tensors.arrangement import GATE_UP, QKV, REPLICATED, SHARD_1, VOCAB

TENSORS = {
    "embedding.word.weight": (VOCAB, "embedding.word_embeddings.weight"),
    "embedding.position.weight": (REPLICATED, "embedding.position_embeddings.weight"),
    "embedding.norm.{w}": (REPLICATED, "embedding.word_embeddings.norm.{w}"),
    "layers.{i}.input_norm.{w}": (REPLICATED, "layers.{i}.input_layernorm.{w}"),
    "layers.{i}.attention.qkv.{w}": (QKV, "layers.{i}.self_attention.query_key_value.{w}"),
    "layers.{i}.attention.out.weight": (SHARD_1, "layers.{i}.self_attention.dense.weight"),
    "layers.{i}.attention.out.bias": (REPLICATED, "layers.{i}.self_attention.dense.bias"),
    "layers.{i}.post_attention_norm.{w}": (REPLICATED, "layers.{i}.post_attention_layernorm.{w}"),
    "layers.{i}.mlp.fc1.{w}": (GATE_UP, "layers.{i}.mlp.dense_h_to_4h.{w}"),
    "layers.{i}.mlp.fc2.weight": (SHARD_1, "layers.{i}.mlp.dense_4h_to_h.weight"),
    "layers.{i}.mlp.fc2.bias": (REPLICATED, "layers.{i}.mlp.dense_4h_to_h.bias"),
    "final_norm.{w}": (REPLICATED, "final_norm.{w}"),
    "output.weight": (VOCAB, "word_embeddings_for_head.weight"),
}
