"""Builds the tiny GPT, its DistributedDataParallel chunks and its distributed optimizer on any
megatron-core release.

Releases spell options differently; `known` passes on those that the release at hand has, and
`demand` refuses to run without one that the caller asked for."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import transformer_block
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from examples.tiny.options import MLA

Args = argparse.Namespace

#: switches of TransformerConfig whose kernels exist for GPUs only, and are on by default in one
#: release or another
GPU_ONLY = (
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "persist_layer_norm",
    "apply_rope_fusion",
    "cross_entropy_loss_fusion",
)

#: fields of TransformerConfig that say which layers a stage holds, and Megatron-LM's arguments for
#: them
STAGES = {
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "pipeline_model_parallel_layout": "pipeline_model_parallel_layout",
}


def names_of(target: Callable) -> set[str]:
    """The keyword arguments that a function, or the constructor of a class, takes."""
    if dataclasses.is_dataclass(target):
        return {field.name for field in dataclasses.fields(target)}
    return set(inspect.signature(target).parameters)


def known(target: Callable, **options: Any) -> dict[str, Any]:
    """Those of `options` that this release's `target` takes."""
    return {name: value for name, value in options.items() if name in names_of(target)}


def demand(name: str, *targets: Callable) -> None:
    """End the run when none of `targets` takes `name`, instead of training something else than was
    asked for."""
    if not any(name in names_of(target) for target in targets):
        raise SystemExit(
            f"this release of megatron-core has no option {name}; leave it out or choose another "
            f"--core"
        )


def transformer_config(args: Args) -> TransformerConfig:
    # two interleaved stages send to each other both forward and back: never in one batch, where
    # they could not be told apart
    two_way = (
        args.virtual_pipeline_model_parallel_size is not None
        and args.pipeline_model_parallel_size == 2
    )
    options: dict[str, Any] = {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "ffn_hidden_size": args.ffn_hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "num_query_groups": args.num_query_groups,
        "normalization": args.normalization,
        "layernorm_epsilon": args.norm_epsilon,
        "add_bias_linear": args.add_bias_linear,
        "gated_linear_unit": args.swiglu,
        "activation_func": F.silu if args.swiglu else F.gelu,
        "attention_dropout": args.attention_dropout,
        "hidden_dropout": args.hidden_dropout,
        "bf16": args.bf16,
        "fp16": args.fp16,
        "params_dtype": args.params_dtype,
        "pipeline_dtype": args.params_dtype,
        "autocast_dtype": args.params_dtype,
        "tensor_model_parallel_size": args.tensor_model_parallel_size,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": args.virtual_pipeline_model_parallel_size,
        "context_parallel_size": args.context_parallel_size,
        "expert_model_parallel_size": args.expert_model_parallel_size,
        "sequence_parallel": args.sequence_parallel,
        "batch_p2p_sync": False,
        "overlap_p2p_comm": two_way,
        "batch_p2p_comm": not two_way,
        "deallocate_pipeline_outputs": True,
    }
    for name, argument in STAGES.items():
        if getattr(args, argument, None):
            demand(name, TransformerConfig)
            options[name] = getattr(args, argument)
    options |= dict.fromkeys(GPU_ONLY, False)
    if args.num_experts:
        options |= {
            "num_moe_experts": args.num_experts,
            "moe_router_topk": args.moe_router_topk,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 1e-2,
            "moe_token_dispatcher_type": "allgather",
            "moe_grouped_gemm": args.moe_grouped_gemm,
            "moe_use_legacy_grouped_gemm": args.moe_use_legacy_grouped_gemm,
            "moe_shared_expert_intermediate_size": args.moe_shared_expert_intermediate_size,
        }
    if args.moe_shared_expert_intermediate_size:
        demand("moe_shared_expert_intermediate_size", TransformerConfig)
    if args.multi_latent_attention:
        return latent_attention_config(args, options)
    return TransformerConfig(**known(TransformerConfig, **options))


def latent_attention_config(args: Args, options: dict[str, Any]) -> TransformerConfig:
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    sizes = {name: getattr(args, name) for name in MLA}
    return MLATransformerConfig(
        **known(MLATransformerConfig, **options, **sizes, rope_type="rope", qk_layernorm=True)
    )


def layer_spec(args: Args) -> Any:
    is_local = args.transformer_impl == "local"
    name = "get_gpt_layer_local_spec" if is_local else "get_gpt_layer_with_transformer_engine_spec"
    make, options = getattr(gpt_layer_specs, name), {}
    if args.num_experts:
        options = known(
            make,
            num_experts=args.num_experts,
            moe_grouped_gemm=args.moe_grouped_gemm,
            moe_use_legacy_grouped_gemm=args.moe_use_legacy_grouped_gemm,
        )
    if args.multi_latent_attention:
        demand("multi_latent_attention", make)
        options |= {"multi_latent_attention": True, "qk_layernorm": True}
    if args.normalization == "RMSNorm" and is_local:
        demand("normalization", make)
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        options["normalization"] = args.normalization
        transformer_block.LayerNormImpl = (
            WrappedTorchNorm  # the final norm does not follow the spec, and apex has none
        )
    return make(**options)


def gpt_chunks(args: Args, config: TransformerConfig) -> list[GPTModel]:
    """One model per virtual pipeline chunk of this rank's stage."""
    chunks = []
    size = args.virtual_pipeline_model_parallel_size
    for index in range(size or 1):
        stage: dict[str, Any] = {}
        if size:
            if hasattr(parallel_state, "set_virtual_pipeline_model_parallel_rank"):
                parallel_state.set_virtual_pipeline_model_parallel_rank(index)
            stage = known(
                parallel_state.is_pipeline_first_stage, ignore_virtual=False, vp_stage=index
            )
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=layer_spec(args),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(**stage),
            post_process=parallel_state.is_pipeline_last_stage(**stage),
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            **(known(GPTModel.__init__, vp_stage=index) if size else {}),
        )
        chunk.model_type = ModelType.encoder_or_decoder
        for param in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(param)
        chunks.append(chunk)
    return chunks


def keep_in_fp32(chunk: torch.nn.Module, text: str) -> None:
    """As a model does that keeps some parameters in fp32, such as an fp32 router."""
    chosen = [param for name, param in chunk.named_parameters() if text in name]
    if not chosen:
        raise SystemExit(f"--fp32 {text}: no parameter has that in its name")
    for param in chosen:
        param.data = param.data.float()


def data_parallel(
    args: Args, options: Args, config: TransformerConfig, chunks: list[torch.nn.Module]
) -> list[DistributedDataParallel]:
    """Several buckets on the first stage's first chunk, as Megatron does it; one bucket
    elsewhere."""
    padding = "pad_buckets_for_high_nccl_busbw"
    buckets: dict[str, Any] = {
        "overlap_grad_reduce": True,
        "use_distributed_optimizer": True,
        "check_for_nan_in_grad": False,
        "bucket_size": options.bucket,
    }
    if "ddp_config" in names_of(DistributedDataParallel.__init__):
        from megatron.core.distributed import DistributedDataParallelConfig

        if options.pad_busbw:
            demand(padding, DistributedDataParallelConfig)
        buckets = {
            "ddp_config": DistributedDataParallelConfig(
                **known(
                    DistributedDataParallelConfig,
                    grad_reduce_in_fp32=True,
                    average_in_collective=False,
                    **{padding: options.pad_busbw},
                    **buckets,
                )
            )
        }
    else:  # 0.6
        if options.pad_busbw:
            demand(padding, DistributedDataParallel.__init__)
        buckets |= {
            "accumulate_allreduce_grads_in_fp32": True,
            "data_parallel_group": parallel_state.get_data_parallel_group(
                with_context_parallel=True
            ),
            "expert_data_parallel_group": parallel_state.get_data_modulo_expert_parallel_group(),
        }
    return [
        DistributedDataParallel(config=config, module=chunk, disable_bucketing=index > 0, **buckets)
        for index, chunk in enumerate(chunks)
    ]


def build(
    args: Args, options: Args
) -> tuple[TransformerConfig, list[DistributedDataParallel], Any]:
    """The configuration, the wrapped chunks of this rank, and the (chained) distributed optimizer
    over them."""
    config = transformer_config(args)
    chunks: list[torch.nn.Module] = gpt_chunks(args, config)
    if args.bf16 or args.fp16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    if options.fp32:
        for chunk in chunks:
            keep_in_fp32(chunk, options.fp32)
    wrapped = data_parallel(args, options, config, chunks)
    if args.overlap_param_gather:
        demand("overlap_param_gather", OptimizerConfig)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            **known(
                OptimizerConfig,
                optimizer=args.optimizer,
                lr=args.lr,
                min_lr=args.min_lr,
                weight_decay=args.weight_decay,
                bf16=args.bf16,
                fp16=args.fp16,
                params_dtype=args.params_dtype,
                loss_scale=128.0 if args.fp16 else None,
                use_distributed_optimizer=True,
                overlap_grad_reduce=True,
                overlap_param_gather=args.overlap_param_gather,
                clip_grad=args.clip_grad,
            )
        ),
        wrapped,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = (
        [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    )
    config.grad_scale_func = optimizer.scale_loss
    return config, wrapped, optimizer


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DistributedDataParallel and Float16Module, whose names are the
    checkpoint's."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module
    return chunk


def load(chunk: torch.nn.Module, state: dict[str, Any]) -> None:
    """Strictly, but for extra states, without which Megatron-LM goes on too (its
    load_model_state_dict())."""
    missing, unexpected = chunk.load_state_dict(state, strict=False)
    wrong = [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]
    if wrong:
        raise RuntimeError(f"of model and checkpoint, one alone has {', '.join(wrong)}")
