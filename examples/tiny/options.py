"""What can be chosen about a tiny training run, and the same choices under the names Megatron-LM's
`args` give them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

#: the vocabulary is padded to a multiple of this times tp, as --make-vocab-size-divisible-by does
VOCAB_DIVISOR = 16
MICRO_BATCH_SIZE = 2
LEARNING_RATE, MIN_LEARNING_RATE, WEIGHT_DECAY = 1e-2, 1e-3, 0.01
DROPOUT = 0.1

SIZES = {
    "tp": (1, "tensor parallel size"),
    "pp": (1, "pipeline parallel size"),
    "vpp": (1, "virtual pipeline chunks per stage"),
    "dp": (1, "data parallel size"),
    "cp": (1, "context parallel size; more than 1 with transformer_engine only"),
    "ep": (1, "expert parallel size, a divisor of dp"),
    "experts": (0, "number of experts; 0 is a dense model"),
    "shared_expert": (
        0,
        "ffn hidden size of shared experts; 0 is none (megatron-core 0.12 and later)",
    ),
    "layers": (8, "number of layers"),
    "first_stage_layers": (
        0,
        "layers of the first stage; 0 is as many as others have (megatron-core 0.12 and later)",
    ),
    "hidden": (128, "hidden size"),
    "heads": (8, "attention heads"),
    "gqa": (0, "query groups; 0 is one per head"),
    "vocab": (250, "vocabulary before padding"),
    "seq": (32, "sequence length"),
    "bucket": (100_000, "elements at which a bucket is closed"),
    "global_batch": (
        0,
        "samples of a step over all dp ranks; 0 is two micro-batches, or pp, for each of them",
    ),
    "steps": (3, "training steps from iteration 0 on, and the iteration that is saved"),
    "further_steps": (
        0,
        "with --plain, steps that the same run goes on after it saved; what they did is in "
        "further/",
    ),
    "seed": (1234, "seed of weights and data"),
}

FP32_HELP = """parameters with TEXT in their name stay fp32. Megatron puts every one-dimensional parameter into the
group without weight decay: with --no-bias, `--fp32 norm` makes a group of fp32 parameters only, and `--fp32
input_layernorm` one that also holds bf16 norms, whose optimizer state Megatron then saves in the wrong order"""

#: the first two from megatron-core 0.15 on, the third in all releases, the last up to 0.12
DIST_OPTIM = (
    "fully_reshardable",
    "dp_reshardable",
    "fully_sharded_model_space",
    "fully_sharded_bucket_space",
)
DIST_OPTIM_HELP = "how torch_dist shards the optimizer's state, by megatron-core's name for it"

STAGE_LAYOUT_HELP = """what each stage, or each chunk in the order in which data passes them, holds, as Megatron-LM's
--pipeline-model-parallel-layout takes it, e.g. "E|tt|tttL" (megatron-core 0.13 and later)"""

TRANSFORMER_IMPLS = ("local", "transformer_engine")
TRANSFORMER_IMPL_HELP = (
    "whose layers; transformer_engine is the stand-in of cpu_shim (megatron-core 0.12 and later)"
)

#: sizes of --mla
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
}

SWITCHES = {
    "no_bias": "linear layers without bias",
    "untie": "an output layer of its own instead of the word embedding",
    "swiglu": "gated MLP",
    "grouped_gemm": "all experts of a rank in one layer, as GroupedMLP has them or, of "
    "transformer_engine, TEGroupedMLP",
    "mla": "multi-latent attention (megatron-core 0.12 and later)",
    "rmsnorm": "RMSNorm instead of LayerNorm (megatron-core 0.12 and later)",
    "rope": "rotary instead of learned positions",
    "overlap_param_gather": "up to megatron-core 0.7 this saves 16-bit weights that are one step "
    "old, where dp > 1",
    "pad_busbw": "pad buckets to 2^16 elements too (megatron-core 0.12 and later)",
    "no_ckpt_fully_parallel_save": "torch_dist: each tensor is saved by the first of its "
    "data-parallel ranks",
    "no_args": "save without args, as a script around bare megatron-core does",
    "no_hook": "save without the sidecars of hooks/param_map.py",
    "plain": "every step trains and no element is made unique; losses are kept in truth/ (see "
    "tiny/losses.py)",
    "dropout": f"dropout of {DROPOUT} after attention and in layers, so that the states of random "
    f"generators matter",
}


def parser() -> argparse.ArgumentParser:
    """The command line of examples/train_tiny.py."""
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument(
        "--core",
        default="0.16.1",
        help="release of megatron-core, or a folder that holds `megatron`",
    )
    result.add_argument("--out", type=Path, required=True, help="folder to create")
    result.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="dtype of the model"
    )
    result.add_argument("--fp32", metavar="TEXT", help=FP32_HELP)
    result.add_argument(
        "--ckpt-format",
        choices=("torch", "torch_dist"),
        default="torch",
        help="format of the checkpoint",
    )
    result.add_argument(
        "--dist-optim", choices=DIST_OPTIM, default=DIST_OPTIM[0], help=DIST_OPTIM_HELP
    )
    result.add_argument(
        "--transformer-impl", choices=TRANSFORMER_IMPLS, default="local", help=TRANSFORMER_IMPL_HELP
    )
    result.add_argument(
        "--extra-state",
        choices=("empty", "none", "bytesio", "fp8"),
        default="empty",
        help="what Transformer Engine's modules save beside their parameters",
    )
    result.add_argument("--stage-layout", metavar="TEXT", help=STAGE_LAYOUT_HELP)
    result.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on from the latest checkpoint in DIR"
    )
    for name, (default, text) in SIZES.items():
        flag = "--" + name.replace("_", "-")
        result.add_argument(flag, type=int, default=default, help=f"{text} (default {default})")
    for name, text in SWITCHES.items():
        result.add_argument("--" + name.replace("_", "-"), action="store_true", help=text)
    return result


def command_line(options: dict[str, Any]) -> list[str]:
    """The arguments of train_tiny.py that say `options`, e.g. {"tp": 2, "no_bias": True} is --tp 2
    --no-bias."""
    words: list[str] = []
    for name, value in sorted(options.items()):
        flag = "--" + name.replace("_", "-")
        words += ([flag] if value else []) if name in SWITCHES else [flag, str(value)]
    return words


def world_size(options: argparse.Namespace) -> int:
    return options.tp * options.pp * options.dp * options.cp


def padded_vocab(options: argparse.Namespace) -> int:
    multiple = VOCAB_DIVISOR * options.tp
    return -(-options.vocab // multiple) * multiple


def global_batch_size(options: argparse.Namespace) -> int:
    return MICRO_BATCH_SIZE * micro_batches(options) * options.dp


def micro_batches(options: argparse.Namespace) -> int:
    """Of each dp rank. By default two or more, so that gradients accumulate, and a multiple of pp,
    as the interleaved schedule asks for; with --global-batch the same samples in every layout."""
    if not options.global_batch:
        return max(2, options.pp)
    number, rest = divmod(options.global_batch, MICRO_BATCH_SIZE * options.dp)
    if rest or not number:
        raise SystemExit(
            f"--global-batch {options.global_batch}: {options.dp} dp ranks take it in "
            f"micro-batches of "
            f"{MICRO_BATCH_SIZE}; choose a multiple of {MICRO_BATCH_SIZE * options.dp}"
        )
    return number


def stage_layout_args(options: argparse.Namespace) -> dict[str, str | None]:
    """What `args` say of --stage-layout: nothing in releases that have no such argument, unless it
    was asked for."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    name, known = "pipeline_model_parallel_layout", dataclasses.fields(TransformerConfig)
    return (
        {name: options.stage_layout}
        if options.stage_layout or name in {field.name for field in known}
        else {}
    )


def megatron_args(options: argparse.Namespace, rank: int) -> argparse.Namespace:
    """`args` as Megatron-LM stores them in model_optim_rng.pt, as far as they describe this run.

    The names are those of megatron/training/arguments.py (Megatron-LM, core_r0.6.0 to
    core_r0.16.0)."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options.dtype]
    interleaved, uneven = options.vpp > 1, bool(options.first_stage_layers or options.stage_layout)
    return argparse.Namespace(
        num_layers=options.layers,
        encoder_num_layers=options.layers,
        hidden_size=options.hidden,
        ffn_hidden_size=4 * options.hidden,
        num_attention_heads=options.heads,
        kv_channels=options.hidden // options.heads,
        group_query_attention=bool(options.gqa),
        num_query_groups=options.gqa or options.heads,
        seq_length=options.seq,
        encoder_seq_length=options.seq,
        max_position_embeddings=options.seq,
        position_embedding_type="rope" if options.rope else "learned_absolute",
        add_position_embedding=not options.rope,
        vocab_size=options.vocab,
        padded_vocab_size=padded_vocab(options),
        make_vocab_size_divisible_by=VOCAB_DIVISOR,
        untie_embeddings_and_output_weights=options.untie,
        swiglu=options.swiglu,
        normalization="RMSNorm" if options.rmsnorm else "LayerNorm",
        norm_epsilon=1e-5,
        add_bias_linear=not options.no_bias,
        add_qkv_bias=False,
        qk_layernorm=options.mla,
        multi_latent_attention=options.mla,
        **(MLA if options.mla else {}),
        attention_dropout=DROPOUT * options.dropout,
        hidden_dropout=DROPOUT * options.dropout,
        num_experts=options.experts or None,
        moe_router_topk=2,
        moe_grouped_gemm=options.grouped_gemm,
        moe_use_legacy_grouped_gemm=options.grouped_gemm and options.transformer_impl == "local",
        moe_shared_expert_intermediate_size=options.shared_expert or None,
        tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp,
        transformer_pipeline_model_parallel_size=options.pp,
        virtual_pipeline_model_parallel_size=options.vpp if interleaved else None,
        num_layers_per_virtual_pipeline_stage=(
            options.layers // options.pp // options.vpp if interleaved and not uneven else None
        ),
        decoder_first_pipeline_num_layers=options.first_stage_layers or None,
        decoder_last_pipeline_num_layers=None,
        **stage_layout_args(options),
        data_parallel_size=options.dp,
        expert_model_parallel_size=options.ep,
        context_parallel_size=options.cp,
        sequence_parallel=(bool(options.experts) or options.mla) and options.tp > 1,
        use_tp_pp_dp_mapping=False,
        world_size=world_size(options),
        rank=rank,
        local_rank=rank,
        params_dtype=dtype,
        bf16=options.dtype == "bf16",
        fp16=options.dtype == "fp16",
        accumulate_allreduce_grads_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=options.overlap_param_gather,
        ddp_bucket_size=options.bucket,
        optimizer="adam",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_eps=1e-8,
        clip_grad=1.0,
        lr=LEARNING_RATE,
        min_lr=MIN_LEARNING_RATE,
        lr_decay_style="linear",
        lr_decay_iters=10,
        lr_warmup_iters=0,
        weight_decay=WEIGHT_DECAY,
        start_weight_decay=WEIGHT_DECAY,
        end_weight_decay=WEIGHT_DECAY,
        weight_decay_incr_style="constant",
        micro_batch_size=MICRO_BATCH_SIZE,
        global_batch_size=global_batch_size(options),
        train_iters=10,
        iteration=options.steps,
        consumed_train_samples=options.steps * global_batch_size(options),
        seed=options.seed,
        save=str(options.out),
        ckpt_format=options.ckpt_format,
        use_dist_ckpt=options.ckpt_format != "torch",
        no_save_optim=None,
        no_save_rng=None,
        data_parallel_random_init=False,
        use_mcore_models=True,
        transformer_impl=options.transformer_impl,
        ckpt_fully_parallel_save=not options.no_ckpt_fully_parallel_save,
    )
