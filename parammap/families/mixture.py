"""Mixtures of experts, and multi-latent attention, as Megatron-LM and MindSpeed-Core-MS have them.

Experts are tensors of their own, or all of a rank's are two (grouped).

Sources: Megatron-LM core_r0.6.0 … 0.19 (core/models/gpt/gpt_layer_specs.py, core/transformer/moe,
core/transformer/multi_latent_attention.py), MindSpeed-Core-MS r0.1.0 (mindspeed_ms/legacy/model).
"""

from parammap.families import decoder
from parammap.families.family import Family, in_layer, row
from parammap.tensors.arrangement import (
    EXPERTS_FC1,
    EXPERTS_FC2,
    GATE_UP,
    KV_DOWN,
    Q_DOWN,
    QKV_DOWN,
    REPLICATED,
    SHARD_0,
    SHARD_1,
)

MLA = in_layer(
    decoder.LAYER,
    row("attention.q_proj.weight", SHARD_0, core="self_attention.linear_q_proj.weight"),
    row("attention.q_down.weight", Q_DOWN, core="self_attention.linear_q_down_proj.weight"),
    row("attention.q_up.weight", SHARD_0, core="self_attention.linear_q_up_proj.weight"),
    row("attention.kv_down.weight", KV_DOWN, core="self_attention.linear_kv_down_proj.weight"),
    row("attention.kv_up.weight", SHARD_0, core="self_attention.linear_kv_up_proj.weight"),
    row(
        "attention.kv_norm.{w}",
        REPLICATED,
        core=(
            "self_attention.kv_layernorm.{w}",
            "self_attention.linear_kv_up_proj.layer_norm_{w}",
        ),
    ),
    row("attention.qkv_down.weight", QKV_DOWN, core="self_attention.linear_qkv_down_proj.weight"),
)
EXPERTS = in_layer(
    decoder.LAYER,
    row(
        "mlp.router.weight",
        REPLICATED,
        legacy="mlp.router.weight",
        core="mlp.router.weight",
        mindspore="mlp.router.gating.weight",
    ),
    row("mlp.router.bias", REPLICATED, legacy="mlp.router.bias", core="mlp.router.bias"),
    row("mlp.router.expert_bias", REPLICATED, core="mlp.router.expert_bias"),
    row(
        "mlp.experts.{e}.fc1.{w}",
        GATE_UP,
        legacy="mlp.local_experts.{e}.dense_h_to_4h.{w}",
        core=("mlp.experts.local_experts.{e}.linear_fc1.{w}", "mlp.experts.linear_fc1.{w}{e}"),
        mindspore="mlp.experts.local_experts.{e}.mapping.{w}",
    ),
    row(
        "mlp.experts.{e}.fc2.weight",
        SHARD_1,
        legacy="mlp.local_experts.{e}.dense_4h_to_h.weight",
        core=(
            "mlp.experts.local_experts.{e}.linear_fc2.weight",
            "mlp.experts.linear_fc2.weight{e}",
        ),
        mindspore="mlp.experts.local_experts.{e}.projection.weight",
    ),
    row(
        "mlp.experts.{e}.fc2.bias",
        REPLICATED,
        legacy="mlp.local_experts.{e}.dense_4h_to_h.bias",
        core=("mlp.experts.local_experts.{e}.linear_fc2.bias", "mlp.experts.linear_fc2.bias{e}"),
        mindspore="mlp.experts.local_experts.{e}.projection.bias",
    ),
    row("mlp.experts.grouped.fc1", EXPERTS_FC1, core="mlp.experts.weight1"),
    row("mlp.experts.grouped.fc2", EXPERTS_FC2, core="mlp.experts.weight2"),
    row("mlp.shared_experts.fc1.weight", GATE_UP, core="mlp.shared_experts.linear_fc1.weight"),
    row("mlp.shared_experts.fc2.weight", SHARD_1, core="mlp.shared_experts.linear_fc2.weight"),
    row("mlp.shared_experts.gate_weight", REPLICATED, core="mlp.shared_experts.gate_weight"),
)
TOGETHER = (
    frozenset({"attention.kv_up.weight", "attention.out.weight"}),
    frozenset({"mlp.experts.0.fc1.weight", "mlp.experts.0.fc2.weight"}),
    frozenset({"mlp.experts.grouped.fc1", "mlp.experts.grouped.fc2"}),
    frozenset({"mlp.shared_experts.fc1.weight", "mlp.shared_experts.fc2.weight"}),
    *decoder.TOGETHER,
)

MIXTURE = Family(
    name="mixture",
    title="Mixtures of experts",
    rows=(*MLA, *EXPERTS),
    shares=(decoder.MEGATRON,),
    together=TOGETHER,
)
