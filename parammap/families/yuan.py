"""Yuan-2.0: a LLaMA-like decoder whose attention takes queries and keys from a localized filter of
its input.

What a Yuan model shares with GPT-like decoders is in gpt.py's table; here is what it has in place
of the fused qkv. Values are a projection of their own. Queries and keys are fused as the rows
[head, q + k, head size]. The filter's two convolutions and its norm are plain torch modules, whole
on every tensor-parallel rank.

`fc1` is [gate; up] as in every gated model: its first half is the one that SiLU activates
(ParallelMLP, swiglu). Yuan's own Hugging Face model names the two the other way round: `up_proj` is
our gate, `gate_proj` is our up.

Source: Yuan-2.0 (megatron/model/transformer.py, LocalizedFiltering and ParallelAttention with
--use-lf-gate; megatron/model/yuan_hf_model.py, YuanMLP)."""

from parammap.tensors.arrangement import QK, REPLICATED, SHARD_0

_ATTENTION = "language_model.encoder.layers.{i}.self_attention."

#: canonical name: (arrangement, legacy names, core names, MindSpore name)
ROWS_OF_TABLE = {
    "layers.{i}.attention.v.{w}": (SHARD_0, [_ATTENTION + "get_value.{w}"], [], None),
    "layers.{i}.attention.qk.{w}": (QK, [_ATTENTION + "get_query_key.{w}"], [], None),
    "layers.{i}.attention.filter.conv1.{w}": (
        REPLICATED,
        [_ATTENTION + "lf_gate.conv1.{w}"],
        [],
        None,
    ),
    "layers.{i}.attention.filter.conv2.{w}": (
        REPLICATED,
        [_ATTENTION + "lf_gate.conv2.{w}"],
        [],
        None,
    ),
    "layers.{i}.attention.filter.norm.weight": (
        REPLICATED,
        [_ATTENTION + "lf_gate.output_layernorm.weight"],
        [],
        None,
    ),
}

#: the canonical tensors that every model of the family has in each layer, and once
REQUIRED_IN_LAYER = [
    "input_norm.weight",
    "attention.v.weight",
    "attention.qk.weight",
    "attention.filter.conv1.weight",
    "attention.filter.conv2.weight",
    "attention.filter.norm.weight",
    "attention.out.weight",
    "post_attention_norm.weight",
]
REQUIRED = ["embedding.word.weight", "final_norm.weight"]
