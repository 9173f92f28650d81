# SPDX-License-Identifier: Apache-2.0

"""Facts of the running model and of its parallelism, for the layout that param_layout writes."""

import sys
from functools import reduce
from typing import Any, Dict, Optional, Sequence

import torch

from parammap.hooks.sidecar_files import NoSidecar, to_plain

CONFIG_OR_ARGS = """
    num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels normalization
    add_bias_linear add_qkv_bias params_dtype
    """.split()  # noqa: SIM905
CONFIG = """
    num_query_groups layernorm_epsilon layernorm_zero_centered_gamma qk_layernorm qk_l2_norm
    attention_output_gate softmax_scale softmax_type window_size window_attn_skip_freq
    rotary_interleaved no_rope_freq glu_linear_offset heterogeneous_block_specs
    multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    rope_type rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow mscale
    mscale_all_dim mla_down_proj_fusion
    moe_grouped_gemm moe_use_legacy_grouped_gemm moe_single_grouped_weight moe_single_grouped_bias
    moe_mlp_glu_interleave_size moe_layer_freq moe_ffn_hidden_size moe_latent_size
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_shared_expert_glu_interleave_size
    moe_router_topk moe_router_score_function moe_router_pre_softmax moe_router_num_groups
    moe_router_group_topk moe_router_topk_scaling_factor moe_router_enable_expert_bias
    mtp_num_layers mtp_use_repeated_layer
    experimental_attention_variant linear_attention_freq linear_conv_kernel_dim linear_key_head_dim
    linear_value_head_dim linear_num_key_heads linear_num_value_heads
    dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk
    is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
    fp8 fp8_recipe fp8_param fp4 fp4_recipe fp4_param
    """.split()  # noqa: SIM905
#: name of a fact of the whole model -> where the running model may state it, the best place first
MODEL_FACTS = {
    **{fact: (f"config.{fact}", f"args.{fact}") for fact in CONFIG_OR_ARGS},
    **{fact: (f"config.{fact}",) for fact in CONFIG},
    "vocab_size": ("tokenizer.vocab_size", "args.vocab_size"),
    "padded_vocab_size": ("args.padded_vocab_size", "model.vocab_size"),
    "make_vocab_size_divisible_by": ("args.make_vocab_size_divisible_by",),
    "max_position_embeddings": ("args.max_position_embeddings", "model.max_sequence_length"),
    "position_embedding_type": ("args.position_embedding_type", "model.position_embedding_type"),
    "rotary_base": ("args.rotary_base", "model.rotary_base"),
    "rotary_percent": ("args.rotary_percent", "model.rotary_percent"),
    "rotary_seq_len_interpolation_factor": ("args.rotary_seq_len_interpolation_factor",),
    "use_rope_scaling": ("args.use_rope_scaling", "model.rotary_scaling"),
    "rope_scaling_factor": ("args.rope_scaling_factor",),
    "swiglu": ("config.gated_linear_unit", "args.swiglu"),
    "activation_func": ("config.activation_func.__name__",),
    "num_experts": ("config.num_moe_experts", "args.num_experts"),
    "hybrid_layer_pattern": (
        "model.hybrid_layer_pattern",
        "model.hybrid_override_pattern",
        "args.hybrid_layer_pattern",
        "args.hybrid_override_pattern",
    ),
}


def model_facts(args: Any, chunks: Sequence[torch.nn.Module]) -> Dict[str, Any]:
    """Facts of the whole model, by their names in MODEL_FACTS; null where nothing states them."""
    global_vars = sys.modules.get("megatron.training.global_vars")
    sources = {
        "args": args,
        "model": chunks[0],
        "config": getattr(chunks[0], "config", None),
        "tokenizer": getattr(global_vars, "_GLOBAL_TOKENIZER", None),
    }

    def stated(place: str) -> Any:
        source, *path = place.split(".")
        return reduce(lambda value, name: getattr(value, name, None), path, sources[source])

    def first_stated(places: Sequence[str]) -> Any:
        values = (stated(place) for place in places)
        return to_plain(next((value for value in values if value is not None), None))

    facts = {fact: first_stated(places) for fact, places in MODEL_FACTS.items()}
    shared = getattr(chunks[0], "share_embeddings_and_output_weights", None)
    facts["untie_embeddings_and_output_weights"] = None if shared is None else not shared
    facts["transformer_impl"] = _transformer_impl(chunks)
    return facts


def _transformer_impl(chunks: Sequence[torch.nn.Module]) -> Optional[str]:
    """Told by the modules: a configuration's default, or --spec, can say what the model is not.

    None where this rank has no layer.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    if not any(hasattr(module, "layer_number") for module in modules):
        return None
    origins = {base.__module__ for module in modules for base in type(module).__mro__}
    has_engine = any("transformer_engine" in origin.split(".") for origin in origins)
    return "transformer_engine" if has_engine else "local"


def core_version() -> str:
    """Version of megatron-core."""
    from megatron.core import package_info

    return str(package_info.__version__)


def parallel_sizes(vpp: int) -> Dict[str, Any]:
    """Sizes of the parallel dimensions; vpp is the number of this rank's model chunks."""
    from megatron.core import parallel_state as mpu

    tp, cp = mpu.get_tensor_model_parallel_world_size(), mpu.get_context_parallel_world_size()
    dp, pp = mpu.get_data_parallel_world_size(), mpu.get_pipeline_model_parallel_world_size()
    etp = getattr(mpu, "get_expert_tensor_parallel_world_size", lambda: tp)()
    if etp > tp:
        raise NoSidecar(f"with expert tensor parallel size {etp} > {tp} rank names are not unique")
    return {
        "tp": tp,
        "pp": pp,
        "vpp": vpp,
        "ep": mpu.get_expert_model_parallel_world_size(),
        "etp": etp,
        "cp": cp,
        "dp": dp,
        "order": _rank_order(mpu, tp * cp, dp, pp),
        "world_size": torch.distributed.get_world_size(),
    }


def rank_coordinates() -> Dict[str, int]:
    """Coordinates of this rank."""
    from megatron.core import parallel_state as mpu

    tp = mpu.get_tensor_model_parallel_rank()
    return {
        "global": torch.distributed.get_rank(),
        "tp": tp,
        "pp": mpu.get_pipeline_model_parallel_rank(),
        "ep": mpu.get_expert_model_parallel_rank(),
        "etp": getattr(mpu, "get_expert_tensor_parallel_rank", lambda: tp)(),
    }


def _rank_order(mpu: Any, tp_cp: int, dp: int, pp: int) -> Optional[str]:
    """Order of the parallel dimensions, fastest first, by the distance of two pipeline stages."""
    if dp == 1 or pp == 1:
        return "tp-cp-ep-dp-pp"
    group = mpu.get_pipeline_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(
        group[0] if isinstance(group, list) else group
    )
    orders = {tp_cp * dp: "tp-cp-ep-dp-pp", tp_cp: "tp-cp-ep-pp-dp"}
    return orders.get(ranks[1] - ranks[0])
