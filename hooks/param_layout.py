# SPDX-License-Identifier: Apache-2.0

"""Write down, at every save, where each parameter lies in the distributed optimizer's flat buffers.

A checkpoint with flat buckets names no parameters in them: which elements of which bucket belong to
which parameter is known only to the running process. save_param_layout() stores that as one small
JSON file per rank that writes optimizer state, beside the checkpoint. It communicates with no other
rank, touches no GPU memory and never raises.
"""

import os
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch

from parammap.hooks.param_facts import core_version, model_facts, parallel_sizes, rank_coordinates
from parammap.hooks.sidecar_files import (
    NoSidecar,
    dtype_name,
    harmless,
    sync_in_background,
    to_json,
    write_files,
)

SCHEMA, SCHEMA_VERSION = "parammap.layout", 1
#: option of DistributedDataParallelConfig -> what a release without that option does
DDP_FACTS = {
    "bucket_size": None,
    "overlap_grad_reduce": False,
    "pad_buckets_for_high_nccl_busbw": False,
    "num_distributed_optimizer_instances": 1,
}


class Owner(NamedTuple):
    """Of a parameter: its model chunk, its key in the checkpoint, the class of its module."""

    chunk: int
    key: str
    module: str


Owners = Dict[torch.nn.Parameter, Owner]
#: the model chunks of a rank, or its only one
Model = Union[torch.nn.Module, List[torch.nn.Module], Tuple[torch.nn.Module, ...]]


class RankLayout(NamedTuple):
    """What one rank knows.

    Attributes:
        content: what its layout file says; null for an optimizer whose state another rank writes.
        optimizers: the description of every optimizer of the rank, whoever writes its state.
    """

    content: Dict[str, Any]
    optimizers: List[Optional[Dict[str, Any]]]


@harmless
def save_param_layout(
    args: Any,
    iteration: int,
    model: Model,
    optimizer: Any,
    checkpoint_name: str,
) -> None:
    """Write this rank's layout file for the checkpoint that is being saved; warn why not, if not.

    Args:
        args: Megatron's namespace, or None where there is none (bare megatron-core).
        iteration: the iteration that is being saved.
        model: the model chunks of this rank, one per virtual pipeline stage.
        optimizer: a distributed optimizer, or a chain of them.
        checkpoint_name: path of this rank's model_optim_rng.pt (format torch), or of the
            iteration's folder (format torch_dist).
    """
    layout = describe_rank(args, iteration, model, optimizer, checkpoint_name)
    if layout is not None:
        folder = layout_folder(layout.content, checkpoint_name)
        file = {layout_file(layout.content): to_json(layout.content)}
        sync_in_background(write_files(folder, file))


def describe_rank(
    args: Any,
    iteration: int,
    model: Model,
    optimizer: Any,
    checkpoint_name: str,
) -> Optional[RankLayout]:
    """Describe what this rank writes; None where other ranks write all of its optimizers' state.

    Takes what save_param_layout() takes. Raises NoSidecar for a save that a layout cannot describe.
    """
    _refuse_unknown(args, optimizer, checkpoint_name)
    optimizers = _chained(optimizer)
    is_written = [_is_writer(opt) for opt in optimizers]
    if not any(is_written):
        return None
    chunks = [_unwrap(chunk) for chunk in (model if isinstance(model, (list, tuple)) else [model])]
    owners = _owners(chunks)
    described = [_describe_optimizer(opt, owners) for opt in optimizers]
    content = {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "framework": {
            "name": "megatron",
            "core_version": core_version(),
            "torch_version": str(torch.__version__),
        },
        "iteration": iteration,
        "checkpoint_format": _checkpoint_format(args, checkpoint_name),
        "ddp": _ddp_facts(optimizers),
        "parallel": parallel_sizes(len(chunks)),
        "rank": rank_coordinates(),
        "model": model_facts(args, chunks),
        "chunks": [_describe_chunk(vpp, chunk, owners) for vpp, chunk in enumerate(chunks)],
        "optimizers": [entry if mine else None for entry, mine in zip(described, is_written)],
    }
    return RankLayout(content, described)


def place(layout: Dict[str, Any]) -> str:
    """The rank's part of the names of its files, as in Megatron's names of rank folders."""
    rank, has_experts = layout["rank"], layout["parallel"]["ep"] > 1
    return f"_tp{rank['tp']:02}_pp{rank['pp']:03}" + (f"_ep{rank['ep']:03}" if has_experts else "")


def layout_file(layout: Dict[str, Any]) -> str:
    """Name of the rank's layout file."""
    return f"layout{place(layout)}.json"


def layout_folder(layout: Dict[str, Any], checkpoint_name: str) -> str:
    """Folder of the layout files of this save.

    For torch_dist it lies outside of the iteration's folder, which dist_checkpointing.save() wants
    empty: it raises up to core_r0.11.0 if it is not, and warns later.
    """
    path = os.path.abspath(checkpoint_name)
    if layout["checkpoint_format"] == "torch":
        return os.path.join(os.path.dirname(os.path.dirname(path)), "param_map")
    return os.path.join(os.path.dirname(path), "param_map", os.path.basename(path))


# What kind of save this is


def _checkpoint_format(args: Any, checkpoint_name: str) -> str:
    if checkpoint_name.endswith(".pt"):
        return "torch"
    named = getattr(args, "ckpt_format", None) or getattr(args, "dist_ckpt_format", None)
    return named or "torch_dist"


def _refuse_unknown(args: Any, optimizer: Any, checkpoint_name: str) -> None:
    checkpoint_format = _checkpoint_format(args, checkpoint_name)
    if checkpoint_format not in ("torch", "torch_dist"):
        raise NoSidecar(f"checkpoint format {checkpoint_format} is neither torch nor torch_dist")
    if optimizer is None or getattr(args, "no_save_optim", False):
        raise NoSidecar("no optimizer is saved")
    for opt in _chained(optimizer):
        if not any(base.__name__ == "DistributedOptimizer" for base in type(opt).__mro__):
            raise NoSidecar(f"optimizer {type(opt).__name__} is not the distributed optimizer")
        config = getattr(opt, "ddp_config", None)
        if any(getattr(config, flag, False) for flag in ("use_custom_fsdp", "use_megatron_fsdp")):
            raise NoSidecar("fully sharded data parallel has no flat buckets")
        if any(getattr(buffer, "has_nvfp4_params", False) for buffer in _buffers(opt)):
            raise NoSidecar("NVFP4 parameters have a second index map, which is not described")


def _chained(optimizer: Any) -> List[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _is_writer(opt: Any) -> bool:
    """Whether this rank gathers the optimizer's state and writes it."""
    return (
        not getattr(opt, "is_stub_optimizer", False)
        and getattr(opt, "distributed_optimizer_instance_id", 0) == 0
        and torch.distributed.get_rank(opt.data_parallel_group) == 0
    )


# What the model says


def _unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    inner = getattr(chunk, "module", None)
    return _unwrap(inner) if isinstance(inner, torch.nn.Module) else chunk


def _owners(chunks: List[torch.nn.Module]) -> Owners:
    """The owner of every parameter. Tied parameters count once, as in named_parameters().

    The checkpoint's key is the parameter's name, but for the word embedding that the last stage of
    a legacy model holds for its head (megatron/legacy/model/module.py).
    """
    owners = {}
    for index, chunk in enumerate(chunks):
        modules = dict(chunk.named_modules())
        head = getattr(chunk, "_word_embeddings_for_head_key", None)
        for name, param in chunk.named_parameters():
            module = type(modules[name.rpartition(".")[0]]).__name__
            if head is not None and name.startswith("word_embeddings."):
                name = f"{head}.{name.partition('.')[2]}"
            owners[param] = Owner(index, name, module)
    return owners


def _describe_chunk(vpp: int, chunk: torch.nn.Module, owners: Owners) -> Dict[str, Any]:
    """Global zero-based layer numbers in local order, by the path of the list of layers."""
    layers = {}
    for path, module in chunk.named_modules():
        if isinstance(module, torch.nn.ModuleList):
            counted = [getattr(layer, "layer_number", None) for layer in module]  # from 1
            numbers = [number - 1 for number in counted if isinstance(number, int)]
            if numbers and len(numbers) == len(counted):
                layers[path] = numbers
    mine = ((param, owner.key) for param, owner in owners.items() if owner.chunk == vpp)
    return {
        "vpp": vpp,
        "layers": layers,
        "pre_process": getattr(chunk, "pre_process", None),
        "post_process": getattr(chunk, "post_process", None),
        "frozen": [key for param, key in mine if not param.requires_grad],
    }


# What the optimizer says


def _buffers(opt: Any) -> List[Any]:
    return list(getattr(opt, "buffers", ()))


def _ddp_facts(optimizers: List[Any]) -> Optional[Dict[str, Any]]:
    """What the buckets were made by; None where buffers do not say (core 0.6)."""
    buffers = [buffer for opt in optimizers for buffer in _buffers(opt)]
    configs = [buffer.ddp_config for buffer in buffers if hasattr(buffer, "ddp_config")]
    if not configs:
        return None
    return {fact: getattr(configs[0], fact, default) for fact, default in DDP_FACTS.items()}


def _describe_optimizer(opt: Any, owners: Owners) -> Optional[Dict[str, Any]]:
    if getattr(opt, "is_stub_optimizer", False):
        return None
    buffers = [_describe_buffer(buffer, owners) for buffer in opt.buffers]
    is_expert = any(param["expert"] for buffer in buffers for param in buffer["params"])
    return {
        "class": type(opt).__name__,
        "inner_class": type(opt.optimizer).__name__,
        "kind": "expert" if is_expert else "dense",
        "data_parallel_group_idx": getattr(opt, "data_parallel_group_idx", None),
        "data_parallel_size": torch.distributed.get_world_size(opt.data_parallel_group),
        "buffers": buffers,
    }


def _describe_buffer(buffer: Any, owners: Owners) -> Dict[str, Any]:
    """One gbuf of the optimizer's state; start and end count elements of the padded buffer."""
    index_map = sorted(buffer.param_index_map.items(), key=lambda item: item[1][0])
    (chunk,) = {owners[param].chunk for param, _ in index_map}
    ranges, buckets = buffer.bucket_indices, buffer.buckets
    if len(ranges) != len(buckets):
        raise ValueError(f"{len(ranges)} bucket ranges for {len(buckets)} buckets")
    return {
        "chunk": chunk,
        "param_dtype": dtype_name(buffer.param_dtype),
        "grad_dtype": dtype_name(buffer.grad_dtype),
        "numel": buffer.numel,
        "buckets": [
            {"start": start, "end": end, "numel_unpadded": bucket.numel_unpadded}
            for (start, end), bucket in zip(ranges, buckets)
        ],
        "params": [_describe_param(param, owners[param], *where) for param, where in index_map],
    }


def _describe_param(
    param: torch.nn.Parameter, owner: Owner, start: int, end: int, bucket: int
) -> Dict[str, Any]:
    tied = getattr(param, "shared_embedding", False) or getattr(param, "zero_out_wgrad", False)
    return {
        "name": owner.key,
        "shape": list(param.shape),
        "dtype": dtype_name(param.dtype),
        "start": start,
        "end": end,
        "bucket": bucket,
        "partition_dim": getattr(param, "partition_dim", -1),
        "partition_stride": getattr(param, "partition_stride", 1),
        "tensor_parallel": bool(getattr(param, "tensor_model_parallel", False)),
        "tied": bool(tied),
        "expert": not getattr(param, "allreduce", True),
        "sequence_parallel": bool(getattr(param, "sequence_parallel", False)),
        "module": owner.module,
    }
