"""Write down, at every Megatron-LM save, where each parameter lies in the distributed optimizer's flat buckets.

A checkpoint names no parameters in them: which range of which bucket is which is known only to the running process.
save_param_map(), called in megatron/training/checkpointing.py save_checkpoint(), stores that knowledge as small JSON
files, by iteration (see _folders) and, for the latest iteration, in `<save>/param_map/`.
It communicates with no other rank, touches no GPU memory and never raises: training goes on whatever happens here.

The ParamMap project generates this file into Megatron-LM by patches/param_map.patch; edit it there, in hooks/.
"""

import io
import json
import math
import os
import re
import sys
import threading
from collections import Counter, namedtuple
from enum import Enum
from typing import Any, Optional, Sequence, Tuple

import torch

SCHEMA, SCHEMA_VERSION = "parammap.layout", 1
CHECKPOINT_VERSION = 3.0  # what Megatron-LM's generate_state_dict() stores, core_r0.6.0 to main

#: layout key -> where the running model states it: attributes of its TransformerConfig, of the model, of args
MODEL_FACTS = {
    **{fact: (f"config.{fact}", f"args.{fact}") for fact in (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "normalization",
        "add_bias_linear", "add_qkv_bias")},
    **{fact: (f"config.{fact}",) for fact in (
        "num_query_groups", "layernorm_epsilon", "layernorm_zero_centered_gamma", "qk_layernorm",
        "attention_output_gate", "multi_latent_attention", "moe_grouped_gemm", "moe_layer_freq", "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size", "mtp_num_layers")},
    "vocab_size": ("tokenizer.vocab_size", "args.vocab_size"),
    "padded_vocab_size": ("args.padded_vocab_size", "model.vocab_size"),
    "make_vocab_size_divisible_by": ("args.make_vocab_size_divisible_by",),
    "max_position_embeddings": ("args.max_position_embeddings", "model.max_sequence_length"),
    **{fact: (f"args.{fact}", f"model.{fact}") for fact in ("position_embedding_type", "rotary_base", "rotary_percent")},
    "swiglu": ("config.gated_linear_unit", "args.swiglu"),
    "num_experts": ("config.num_moe_experts", "args.num_experts"),
}
#: option of DistributedDataParallelConfig -> what a release without that option does
DDP_FACTS = {"bucket_size": None, "overlap_grad_reduce": False, "pad_buckets_for_high_nccl_busbw": False}

#: of a parameter: its model chunk, its name in named_parameters(), its key in the checkpoint
Owner = namedtuple("Owner", "chunk name key")

_said = set()


def save_param_map(args: Any, iteration: int, model: Sequence[torch.nn.Module], optimizer: Any,
                   checkpoint_name: str) -> None:
    """Write this rank's sidecars for the checkpoint that is being saved; say in one line why not, if not.

    args: Megatron's namespace, or None where there is none (bare megatron-core).
    model: the model chunks of this rank, one per virtual pipeline stage, as Megatron's unwrap_model() gives them.
    checkpoint_name: path of this rank's model_optim_rng.pt (format torch), or of the iteration folder (torch_dist).
    """
    try:
        chunks = [_unwrap(chunk) for chunk in (model if isinstance(model, (list, tuple)) else [model])]
        reason = _why_not(args, optimizer, checkpoint_name)
        if reason is None:
            _save(args, iteration, chunks, optimizer, checkpoint_name)
        elif _global_rank() == 0:
            _say_once(f"no sidecar for this checkpoint: {reason}")
    except Exception as error:
        _say_once(f"rank {_global_rank()} wrote no sidecar, training goes on: {type(error).__name__}: {error}")


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        print(f"param_map: {message}", flush=True)


def _global_rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    while isinstance(getattr(chunk, "module", None), torch.nn.Module):
        chunk = chunk.module
    return chunk


def _optimizers(optimizer: Any) -> list:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _format(args: Any, checkpoint_name: str) -> str:
    named = getattr(args, "ckpt_format", None) or getattr(args, "dist_ckpt_format", None) or "torch_dist"
    return "torch" if checkpoint_name.endswith(".pt") else named


def _folders(checkpoint_format: str, checkpoint_name: str) -> Tuple[str, str]:
    """Where this save's sidecars go, and where the latest ones stand.

    Of torch_dist outside the iteration folder: dist_checkpointing.save() raises up to core_r0.11.0 if that is not empty.
    """
    path = os.path.abspath(checkpoint_name)
    if checkpoint_format == "torch":
        iteration_dir = os.path.dirname(os.path.dirname(path))
        return os.path.join(iteration_dir, "param_map"), os.path.join(os.path.dirname(iteration_dir), "param_map")
    latest = os.path.join(os.path.dirname(path), "param_map")
    return os.path.join(latest, os.path.basename(path)), latest


def _why_not(args: Any, optimizer: Any, checkpoint_name: str) -> Optional[str]:
    """The reason why this save is of a kind that the sidecar does not describe, or None where it does."""
    if _format(args, checkpoint_name) not in ("torch", "torch_dist"):
        return f"checkpoint format {_format(args, checkpoint_name)} is not known to it, only torch and torch_dist are"
    if optimizer is None or getattr(args, "no_save_optim", False):
        return "no optimizer is saved"
    for opt in _optimizers(optimizer):
        if not any(base.__name__ == "DistributedOptimizer" for base in type(opt).__mro__):
            return f"optimizer {type(opt).__name__} is not the distributed optimizer"
        config = getattr(opt, "ddp_config", None)
        if any(getattr(config, flag, False) for flag in ("use_custom_fsdp", "use_megatron_fsdp")):
            return "fully sharded data parallel has no flat buckets that it knows"
        if any(getattr(buffer, "has_nvfp4_params", False) for buffer in getattr(opt, "buffers", ())):
            return "NVFP4 parameters have a second index map that it does not know"
    return None


def _save(args: Any, iteration: int, chunks: list, optimizer: Any, checkpoint_name: str) -> None:
    optimizers = _optimizers(optimizer)
    writes = [_is_writer(opt) for opt in optimizers]
    if not any(writes):
        return
    checkpoint_format, parallel, rank = _format(args, checkpoint_name), _parallel(len(chunks)), _rank()
    owners = _owners(chunks)
    described = [_describe_optimizer(opt, owners) for opt in optimizers]
    files = _compatible_maps(described, writes, owners, parallel, rank, optimizers)
    files.update(_args_files(args, iteration, parallel, rank))
    layout = {
        "schema": SCHEMA, "version": SCHEMA_VERSION,
        "framework": {"name": "megatron", "core_version": _core_version(), "torch_version": str(torch.__version__)},
        "iteration": iteration, "checkpoint_format": checkpoint_format, "ddp": _ddp(optimizers),
        "parallel": parallel, "rank": rank, "model": _model_facts(args, chunks),
        "chunks": [_describe_chunk(vpp, chunk) for vpp, chunk in enumerate(chunks)],
        "optimizers": [entry if mine else None for entry, mine in zip(described, writes)],
    }
    files[f"layout{_place(parallel, rank)}.json"] = _json(layout)  # last: where it stands, the rest stands too
    folder, latest = _folders(checkpoint_format, checkpoint_name)
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        _write_atomically(os.path.join(folder, name), content)
    os.makedirs(latest, exist_ok=True)
    _clear_stale(latest, set(files), parallel, rank)
    for name, content in files.items():
        _link_atomically(os.path.join(folder, name), os.path.join(latest, name), content)
    _sync_in_background([os.path.join(folder, name) for name in files] + [folder, latest])


# ------------------------------------------------------------------------------------------------ what the model says
def _owners(chunks: list) -> dict:
    """Every parameter of the chunks -> Owner. Tied parameters count once, as in named_parameters().

    The checkpoint's key is the parameter's name, nested state dicts joined with '.', but for the word embedding that a
    last stage of a legacy model holds for its head (megatron/legacy/model/module.py initialize_word_embeddings).
    """
    owners = {}
    for index, chunk in enumerate(chunks):
        head = getattr(chunk, "_word_embeddings_for_head_key", None)
        for name, param in chunk.named_parameters():
            is_head = head is not None and name.startswith("word_embeddings.")
            owners[param] = Owner(index, name, f"{head}.{name.partition('.')[2]}" if is_head else name)
    return owners


def _describe_chunk(vpp: int, chunk: torch.nn.Module) -> dict:
    """Global zero-based layer numbers in local order, by the path of the ModuleList that holds the layers."""
    layers = {}
    for path, module in chunk.named_modules():
        if isinstance(module, torch.nn.ModuleList):
            numbers = [getattr(layer, "layer_number", None) for layer in module]
            if numbers and all(isinstance(number, int) for number in numbers):
                layers[path] = [number - 1 for number in numbers]  # Megatron counts from 1
    return {"vpp": vpp, "layers": layers,
            "pre_process": getattr(chunk, "pre_process", None), "post_process": getattr(chunk, "post_process", None)}


def _model_facts(args: Any, chunks: list) -> dict:
    sources = {"args": args, "model": chunks[0], "config": getattr(chunks[0], "config", None),
               "tokenizer": getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_TOKENIZER", None)}

    def first_known(places: Sequence[str]) -> Any:
        found = (getattr(sources[source], field, None) for source, field in (place.split(".") for place in places))
        return next((_plain(value) for value in found if value is not None), None)

    facts = {fact: first_known(places) for fact, places in MODEL_FACTS.items()}
    shared = getattr(chunks[0], "share_embeddings_and_output_weights", None)
    facts["untie_embeddings_and_output_weights"] = None if shared is None else not shared
    return facts


def _core_version() -> str:
    from megatron.core import package_info
    return package_info.__version__


# ------------------------------------------------------------------------------------------- what the parallelism says
def _parallel(vpp: int) -> dict:
    from megatron.core import parallel_state as mpu
    tp, cp, dp = (mpu.get_tensor_model_parallel_world_size(), mpu.get_context_parallel_world_size(),
                  mpu.get_data_parallel_world_size())
    pp = mpu.get_pipeline_model_parallel_world_size()
    return {"tp": tp, "pp": pp, "vpp": vpp, "ep": mpu.get_expert_model_parallel_world_size(),
            "etp": getattr(mpu, "get_expert_tensor_parallel_world_size", lambda: tp)(), "cp": cp, "dp": dp,
            "order": _rank_order(mpu, tp * cp, dp, pp), "world_size": torch.distributed.get_world_size()}


def _rank() -> dict:
    from megatron.core import parallel_state as mpu
    tp = mpu.get_tensor_model_parallel_rank()
    return {"global": torch.distributed.get_rank(), "tp": tp, "pp": mpu.get_pipeline_model_parallel_rank(),
            "ep": mpu.get_expert_model_parallel_rank(),
            "etp": getattr(mpu, "get_expert_tensor_parallel_rank", lambda: tp)()}


def _rank_order(mpu: Any, tp_cp: int, dp: int, pp: int) -> Optional[str]:
    """Order of the parallel dimensions, fastest first, from the distance of neighbours in a pipeline group."""
    if dp == 1 or pp == 1:
        return "tp-cp-ep-dp-pp"
    group = mpu.get_pipeline_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group[0] if isinstance(group, list) else group)
    return {tp_cp * dp: "tp-cp-ep-dp-pp", tp_cp: "tp-cp-ep-pp-dp"}.get(ranks[1] - ranks[0])


def _is_writer(opt: Any) -> bool:
    """Whether this rank holds the optimizer's gathered state, that is, writes it to distrib_optim.pt."""
    return (not getattr(opt, "is_stub_optimizer", False) and getattr(opt, "distributed_optimizer_instance_id", 0) == 0
            and torch.distributed.get_rank(opt.data_parallel_group) == 0)


# -------------------------------------------------------------------------------------------- what the optimizer says
def _describe_optimizer(opt: Any, owners: dict) -> Optional[dict]:
    if getattr(opt, "is_stub_optimizer", False):
        return None
    buffers = [_describe_buffer(buffer, owners) for buffer in opt.buffers]
    is_expert = any(param["expert"] for buffer in buffers for param in buffer["params"])
    return {"class": type(opt).__name__, "kind": "expert" if is_expert else "dense",
            "data_parallel_group_idx": getattr(opt, "data_parallel_group_idx", None),
            "data_parallel_size": torch.distributed.get_world_size(opt.data_parallel_group), "buffers": buffers}


def _ddp(optimizers: list) -> Optional[dict]:
    """What the buckets were made by; None where buffers do not say (core 0.6)."""
    configs = [buffer.ddp_config for opt in optimizers for buffer in getattr(opt, "buffers", ())
               if hasattr(buffer, "ddp_config")]
    return {fact: getattr(configs[0], fact, default) for fact, default in DDP_FACTS.items()} if configs else None


def _sorted_index_map(buffer: Any) -> list:
    return sorted(buffer.param_index_map.items(), key=lambda item: item[1][0])


def _describe_buffer(buffer: Any, owners: dict) -> dict:
    """One gbuf of distrib_optim.pt: start and end count elements of the padded buffer."""
    index_map = _sorted_index_map(buffer)
    chunk, = {owners[param].chunk for param, _ in index_map}
    if len(buffer.bucket_indices) != len(buffer.buckets):
        raise ValueError(f"{len(buffer.bucket_indices)} bucket ranges for {len(buffer.buckets)} buckets")
    buckets = [{"start": start, "end": end, "numel_unpadded": bucket.numel_unpadded}
               for (start, end), bucket in zip(buffer.bucket_indices, buffer.buckets)]
    return {"chunk": chunk, "param_dtype": _dtype(buffer.param_dtype), "grad_dtype": _dtype(buffer.grad_dtype),
            "numel": buffer.numel, "buckets": buckets,
            "params": [_describe_param(param, owners[param].key, *where) for param, where in index_map]}


def _describe_param(param: torch.nn.Parameter, key: str, start: int, end: int, bucket: int) -> dict:
    tied = getattr(param, "shared_embedding", False) or getattr(param, "zero_out_wgrad", False)
    return {"name": key, "shape": list(param.shape), "dtype": _dtype(param.dtype),
            "start": start, "end": end, "bucket": bucket,
            "partition_dim": getattr(param, "partition_dim", -1),
            "partition_stride": getattr(param, "partition_stride", 1),
            "tensor_parallel": bool(getattr(param, "tensor_model_parallel", False)), "tied": bool(tied),
            "expert": not getattr(param, "allreduce", True),
            "sequence_parallel": bool(getattr(param, "sequence_parallel", False))}


# ------------------------------------------------------------------------------------------------------------- files
def _place(parallel: dict, rank: dict) -> str:
    return f"_tp{rank['tp']:02}_pp{rank['pp']:03}" + (f"_ep{rank['ep']:03}" if parallel["ep"] > 1 else "")


def _compatible_maps(described: list, writes: list, owners: dict, parallel: dict, rank: dict, optimizers: list) -> dict:
    """The maps of MindSpeed-Core-MS (r0.1.0, param_map.patch): {name: [dtype, shape, start, end, bucket]}.

    One file per chunk and buffer; a chunk's dense buffers count first, then its expert buffers.
    """
    files, counted = {}, Counter()
    ep = f"ep{rank['ep']}" if parallel["ep"] > 1 else ""
    for i in sorted((i for i, entry in enumerate(described) if entry), key=lambda i: described[i]["kind"]):
        for buffer, entry in zip(optimizers[i].buffers, described[i]["buffers"]):
            number, vpp = counted[entry["chunk"]], entry["chunk"]
            counted[vpp] += 1
            if writes[i]:
                files[f"param_map_buffer{number}_dp0tp{rank['tp']}pp{rank['pp']}vpp{vpp}{ep}.json"] = _json({
                    f"module.{owners[param].name}": [str(param.dtype), list(param.shape), *where]
                    for param, where in _sorted_index_map(buffer)})
    return files


def _args_files(args: Any, iteration: int, parallel: dict, rank: dict) -> dict:
    if args is None:
        return {}
    content = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration}
    pickled = io.BytesIO()
    torch.save(content, pickled)
    stem = f"args{_place(parallel, rank)}"
    return {f"{stem}.pt": pickled.getvalue(), f"{stem}.json": _json(dict(content, args=_plain(vars(args))))}


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).replace("torch.", "")


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: enums and dtypes by name, what JSON does not know as its string."""
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, torch.dtype):
        return _dtype(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


def _clear_stale(folder: str, keep: set, parallel: dict, rank: dict) -> None:
    """Take out of the latest-sidecars folder what an earlier layout left there; other ranks may be writing to it.

    Each rank clears the files of its own place, global rank 0 those of places that this layout does not have. A map
    without a layout beside it came from another tool and may be its checkpoint's only one: it goes to `replaced/`.
    """
    names = set(os.listdir(folder))
    for name in names:
        if not name.startswith(("param_map_buffer", "layout_tp", "args_tp")):
            continue
        at = {axis: int(number) for axis, number in re.findall(r"(vpp|tp|pp|ep)(\d+)", name)}
        has_ep = ("ep" in at) == (parallel["ep"] > 1)
        fits = has_ep and all(at.get(axis, 0) < parallel[axis] for axis in ("tp", "pp", "ep"))
        mine = all(at.get(axis, 0) == rank[axis] for axis in ("tp", "pp", "ep")) if fits else rank["global"] == 0
        layout = f"layout_tp{at.get('tp', 0):02}_pp{at.get('pp', 0):03}" + (f"_ep{at['ep']:03}" if "ep" in at else "")
        if mine and name.startswith("param_map_buffer") and f"{layout}.json" not in names:
            os.makedirs(os.path.join(folder, "replaced"), exist_ok=True)
            os.replace(os.path.join(folder, name), os.path.join(folder, "replaced", name))
        elif mine and name not in keep:
            os.unlink(os.path.join(folder, name))


def _write_atomically(path: str, content: bytes) -> None:
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            file.write(content)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)


def _link_atomically(source: str, path: str, content: bytes) -> None:
    """Give `source`, which holds `content`, a second name; a second copy where the file system knows no hard links."""
    part = f"{path}.{os.getpid()}.part"
    try:
        os.link(source, part)
    except OSError:
        _write_atomically(path, content)
    else:
        os.replace(part, path)


def _sync_in_background(paths: list) -> None:
    """Force files and folders to the disk while training goes on: amid a save fsync can wait for tenths of a second."""
    def sync() -> None:
        for path in paths:
            try:
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            except OSError as error:
                _say_once(f"rank {_global_rank()} could not sync {path}: {error}")

    threading.Thread(target=sync, name="param_map sync").start()
