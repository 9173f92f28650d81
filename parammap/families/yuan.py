"""Yuan-2.0: a LLaMA-like decoder whose attention takes queries and keys from a localized filter of
its input.

In place of the fused qkv, values are a projection of their own, and queries and keys are fused as
the rows [head, q + k, head size]. The filter's two convolutions and its norm are plain torch
modules, whole on every tensor-parallel rank.

`fc1` is [gate; up] as in every gated model: its first half is the one that SiLU activates
(ParallelMLP, swiglu). Yuan's own Hugging Face model names the two the other way round: `up_proj` is
our gate, `gate_proj` is our up.

Source: Yuan-2.0 (megatron/model/transformer.py, LocalizedFiltering and ParallelAttention with
--use-lf-gate; megatron/model/yuan_hf_model.py, YuanMLP)."""

from dataclasses import replace

from parammap.families import decoder
from parammap.families.family import Family, in_layer, row
from parammap.tensors.arrangement import QK, REPLICATED, SHARD_0

#: Yuan-2.0 descends from a Megatron-LM that had legacy models alone
_DECODER = tuple(
    replace(one, cells={"legacy": one.cells["legacy"]})
    for one in decoder.MEGATRON
    if "legacy" in one.cells
)
YUAN = Family(
    name="yuan",
    title="Yuan-2.0",
    rows=in_layer(
        decoder.LAYER,
        row("attention.v.{w}", SHARD_0, legacy="self_attention.get_value.{w}"),
        row("attention.qk.{w}", QK, legacy="self_attention.get_query_key.{w}"),
        row("attention.filter.conv1.{w}", REPLICATED, legacy="self_attention.lf_gate.conv1.{w}"),
        row("attention.filter.conv2.{w}", REPLICATED, legacy="self_attention.lf_gate.conv2.{w}"),
        row(
            "attention.filter.norm.weight",
            REPLICATED,
            legacy="self_attention.lf_gate.output_layernorm.weight",
        ),
    ),
    shares=(_DECODER,),
    together=(
        frozenset(
            {
                "attention.qk.weight",
                "attention.filter.conv1.weight",
                "attention.filter.conv2.weight",
                "attention.filter.norm.weight",
                "attention.v.weight",
                "attention.out.weight",
            }
        ),
        *decoder.TOGETHER,
    ),
)
