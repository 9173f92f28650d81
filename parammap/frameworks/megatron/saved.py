"""What is in the files of a rank: model_optim_rng.pt and distrib_optim.pt (Megatron-LM before core …
main, Yuan-2.0). Values of which nothing is asked here are passed on as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parammap.formats.tree_schema import (
    anything,
    count,
    dict_of,
    either,
    kind,
    list_of,
    namespace,
    optional,
    record,
    size,
)
from parammap.tensors.logical import Stored

_NUMBER, _TEXT = kind(int, float), kind(str)

_COUNTS = (
    "consumed_train_samples consumed_valid_samples ddp_bucket_size ddp_num_buckets "
    "ffn_hidden_size hidden_size kv_channels kv_lora_rank make_vocab_size_divisible_by "
    "max_position_embeddings padded_vocab_size q_lora_rank qk_pos_emb_head_dim seq_length "
    "vocab_size"
)
_SIZES = (
    "context_parallel_size data_parallel_size expert_model_parallel_size "
    "expert_tensor_parallel_size num_attention_heads num_distributed_optimizer_instances "
    "num_experts num_layers num_query_groups pipeline_model_parallel_size rank "
    "tensor_model_parallel_size virtual_pipeline_model_parallel_size world_size"
)
_NUMBERS = (
    "layernorm_epsilon norm_epsilon rope_scaling_factor rotary_base rotary_percent "
    "rotary_seq_len_interpolation_factor weight_decay"
)
_TEXTS = "tokenizer_type transformer_impl"
_ARGS = namespace(
    {
        **dict.fromkeys(_COUNTS.split(), optional(count)),
        **dict.fromkeys(_SIZES.split(), optional(size)),
        **dict.fromkeys(_NUMBERS.split(), optional(_NUMBER)),
        **dict.fromkeys(_TEXTS.split(), optional(_TEXT)),
    }
)


def _model(value: Any, where: str) -> Iterator[str]:
    """State dicts in state dicts."""
    if isinstance(value, dict):
        yield from dict_of(_TEXT, _model)(value, where)


def _optimizer(value: Any, where: str) -> Iterator[str]:
    """An optimizer's state, or a chain of such: a list, or a dict by number."""
    if isinstance(value, dict) and "optimizer" in value:
        yield from _ONE_OPTIMIZER(value, where)
    elif isinstance(value, dict):
        yield from dict_of(anything, _optimizer)(value, where)
    elif isinstance(value, (list, tuple)):
        yield from list_of(_optimizer)(value, where)


_GROUP = dict_of(_TEXT, anything)
_ONE_OPTIMIZER = record(
    {
        "optimizer": optional(record({"param_groups": list_of(_GROUP)})),
        "grad_scaler": optional(record({})),
    }
)

#: all of a model file but the model's own state dicts
METADATA = record(
    {
        "args": optional(_ARGS),
        "iteration": optional(count),
        "optimizer": optional(either((dict, _optimizer), (list, _optimizer))),
        "opt_param_scheduler": optional(dict_of(_TEXT, anything)),
    }
)


def model_file(value: Any, where: str) -> Iterator[str]:
    """The content of model_optim_rng.pt."""
    yield from dict_of(_TEXT, anything)(value, where)
    yield from METADATA(value, where)
    for name, item in value.items() if isinstance(value, dict) else ():
        if name.startswith("model"):
            yield from _model(item, f"[{name!r}]")


_STATES = record({}, required=("param",))
_STATE = either((Stored, anything), (list, list_of(kind(Stored))), (int, count))
_BOUNDS = list_of(dict_of(anything, list_of(count)))


def _buffers(value: Any, where: str) -> Iterator[str]:
    """The buffers of one optimizer, by number."""
    yield from record({"per_bucket_numel": _BOUNDS, "per_bucket_numel_unpadded": _BOUNDS})(
        value, where
    )
    for number, by_dtypes in value.items() if isinstance(value, dict) else ():
        if isinstance(number, int):
            at = f"{where}[{number}]"
            yield from dict_of(anything, _STATES)(by_dtypes, at)
            yield from dict_of(anything, dict_of(_TEXT, _STATE))(by_dtypes, at)


#: the content of distrib_optim.pt: an optimizer's, or those of a chain, of which other ranks hold
#: some
OPTIMIZER = either((dict, _buffers), (list, list_of(optional(_buffers))))
