"""The shapes that a Megatron-LM model's tensors must have by its arguments: copies joined as if
they were parts stand out.

Sources: Megatron-LM core_r0.6.0 … 0.19 (core/transformer/attention.py, multi_latent_attention.py
and mlp.py, core/transformer/moe/router.py, shared_experts.py)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.frameworks.megatron.facts import Facts
from parammap.tensors.logical import LogicalTensor
from parammap.tensors.names import shorten_names

_NUMBERS = (
    (re.compile(r"^layers\.\d+\."), "layers.{i}."),
    (re.compile(r"\.experts\.\d+\."), ".experts.{e}."),
)
_ATTENTION, _MLP = "layers.{i}.attention.", "layers.{i}.mlp."
#: a size as a sum of products of arguments
_Size = tuple[tuple[str, ...], ...]
_HIDDEN, _FFN, _MOE, _SHARED = (
    (("hidden_size",),),
    (("ffn_hidden_size",),),
    (("moe_ffn_hidden_size",),),
    (("moe_shared_expert_intermediate_size",),),
)
_Q_RANK, _KV_RANK, _HEADS = (("q_lora_rank",),), (("kv_lora_rank",),), "num_attention_heads"
_QUERY = ((_HEADS, "qk_head_dim"), (_HEADS, "qk_pos_emb_head_dim"))
#: of every model: the sizes of each dimension by the name of the logical tensor; None: not checked
_SHAPES: dict[str, tuple[_Size | None, ...]] = {
    "embedding.word.weight": (None, _HIDDEN),
    "output.weight": (None, _HIDDEN),
    "embedding.position.weight": (None, _HIDDEN),
    **{
        f"{norm}.{w}": (_HIDDEN,)
        for norm in ("layers.{i}.input_norm", "layers.{i}.post_attention_norm", "final_norm")
        for w in ("weight", "bias")
    },
    **{_MLP + f"{part}.weight": (_FFN, _HIDDEN) for part in ("gate", "up", "fc1")},
    _MLP + "fc2.weight": (_HIDDEN, _FFN),
    **{_MLP + f"experts.{{e}}.{part}.weight": (_MOE, _HIDDEN) for part in ("gate", "up", "fc1")},
    _MLP + "experts.{e}.fc2.weight": (_HIDDEN, _MOE),
    **{
        _MLP + f"shared_experts.{part}.weight": (_SHARED, _HIDDEN) for part in ("gate", "up", "fc1")
    },
    _MLP + "shared_experts.fc2.weight": (_HIDDEN, _SHARED),
    _MLP + "router.weight": ((("num_experts",),), _HIDDEN),
}
#: with multi-latent attention
_LATENT: dict[str, tuple[_Size | None, ...]] = {
    _ATTENTION + "q_proj.weight": (_QUERY, _HIDDEN),
    _ATTENTION + "q_down.weight": (_Q_RANK, _HIDDEN),
    _ATTENTION + "q_norm.weight": (_Q_RANK,),
    _ATTENTION + "q_up.weight": (_QUERY, _Q_RANK),
    _ATTENTION + "kv_down.weight": ((("kv_lora_rank",), ("qk_pos_emb_head_dim",)), _HIDDEN),
    _ATTENTION + "kv_norm.weight": (_KV_RANK,),
    _ATTENTION + "kv_up.weight": (((_HEADS, "qk_head_dim"), (_HEADS, "v_head_dim")), _KV_RANK),
    _ATTENTION + "out.weight": (_HIDDEN, ((_HEADS, "v_head_dim"),)),
}
#: arguments by which layers or experts have sizes of their own
_OTHERWISE = (
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
    "heterogeneous_block_specs",
    "moe_latent_size",
    "use_lf_gate",
)


def contradictions(checkpoint: Checkpoint) -> dict[str, str]:
    """What is wrong, in words, with logical tensors that have another shape than the arguments say
    that Megatron-LM keeps, by their names."""
    facts = Facts.of_checkpoint(checkpoint)
    said = {
        **facts.args,
        **{name: value for name, value in facts.model.items() if value is not None},
    }
    if any(said.get(name) for name in _OTHERWISE):
        return {}
    shapes = {**_SHAPES, **_LATENT} if said.get("multi_latent_attention") else _SHAPES
    wrong: dict[str, dict[str, None]] = {}
    for tensor in checkpoint.index.shards:
        if what := _wrong(tensor, shapes, said):
            wrong.setdefault(what, {})[tensor.name] = None
    return {shorten_names(names): what for what, names in wrong.items()}


def _wrong(
    tensor: LogicalTensor, shapes: dict[str, tuple[_Size | None, ...]], said: dict[str, Any]
) -> str | None:
    sizes = shapes.get(_pattern(tensor.name), ())
    if len(sizes) != len(tensor.shape):
        return None
    expected = tuple(
        there if size is None else _value(size, said) or there
        for size, there in zip(sizes, tensor.shape, strict=True)
    )
    if expected == tensor.shape:
        return None
    names = ", ".join(
        f"{name} {said[name]}" for name in dict.fromkeys(_arguments(sizes)) if name in said
    )
    return (
        f"{list(tensor.shape)} as a whole, and {list(expected)} by the arguments ({names}): as if "
        "whole copies had been joined or cut like parts, which ParamMap 0.1 did with multi-latent "
        "attention; convert the original again"
    )


def _value(size: _Size, said: dict[str, Any]) -> int | None:
    """A size in numbers; None where an argument is not recorded."""
    total = 0
    for product in size:
        value = 1
        for name in product:
            if not isinstance(said.get(name), int):
                return None
            value *= said[name]
        total += value
    return total


def _arguments(sizes: tuple[_Size | None, ...]) -> Iterator[str]:
    yield from (name for size in sizes for product in size or () for name in product)


def _pattern(name: str) -> str:
    for numbers, placeholder in _NUMBERS:
        name = numbers.sub(placeholder, name, count=1)
    return name
