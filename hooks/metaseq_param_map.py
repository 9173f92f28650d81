"""Write down, at every metaseq save, which parameters each flat shard holds and which one each optimizer state is of.

A shard file says the first only inside a pickle, and loses it when it is resharded, and the second not at all: its
optimizer states are numbered. save_param_map(), called in metaseq/trainer.py save_checkpoint(), stores both, and the
configuration, as JSON without pickled classes in `<save_dir>/param_map/`.
It communicates with no other rank, touches no GPU memory and never raises: training goes on whatever happens here.

The ParamMap project generates this file into metaseq by patches/metaseq_param_map.patch; edit it there, in hooks/.
"""

import json
import math
import os
import sys
import threading
from argparse import Namespace
from collections.abc import Mapping
from enum import Enum
from typing import Any, Optional

import torch

SCHEMA, SCHEMA_VERSION = "parammap.metaseq", 1
FSDP_WRAPPERS = ("_fsdp_wrapped_module.", "_fpw_module.")  # what fairscale puts into the paths of its modules
DDP_WRAPPER = "module."

_said = set()


def save_param_map(trainer: Any, state_dict: dict, filename: str) -> None:
    """Write the sidecars of the file that this rank is about to save; say in one line why not, if not.

    trainer: metaseq.trainer.Trainer.
    state_dict: all that the file will hold, on the CPU and in its final dtypes.
    filename: path of the file, `<save_dir>/checkpoint_….pt`.
    """
    try:
        if not trainer.should_save_checkpoint_on_current_rank:
            return
        reason = _why_not(trainer, state_dict)
        if reason is None:
            _save(trainer, state_dict, filename)
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


def _why_not(trainer: Any, state_dict: dict) -> Optional[str]:
    """The reason why this save is of a kind that the sidecar does not describe, or None where it does."""
    if trainer.is_fsdp and "shard_metadata" not in state_dict:
        return "without --use-sharded-state it holds no shards, and names its optimizer states itself"
    if state_dict.get("last_optimizer_state") is not None and not hasattr(trainer.optimizer, "param_groups"):
        return f"optimizer {type(trainer.optimizer).__name__} has no param_groups"
    return None


def _save(trainer: Any, state_dict: dict, filename: str) -> None:
    file = os.path.basename(filename)
    stem, num_updates = os.path.splitext(file)[0], state_dict["optimizer_history"][-1]["num_updates"]
    shard_metadata = state_dict.get("shard_metadata")
    states = (state_dict.get("last_optimizer_state") or {}).get("state", {})
    layout = {
        "schema": SCHEMA, "version": SCHEMA_VERSION,
        "framework": {"name": "metaseq", "torch_version": str(torch.__version__),
                      "fairscale_version": getattr(sys.modules.get("fairscale"), "__version__", None)},
        "file": file, "num_updates": num_updates,
        "model_part": _model_part(trainer), "model_parallel_size": trainer.cfg.common.model_parallel_size,
        "shard": None if shard_metadata is None else trainer.data_parallel_rank,
        "data_parallel_size": trainer.data_parallel_world_size,
        "shard_metadata": _plain(shard_metadata),
        "model": {key: _describe(value) for key, value in state_dict["model"].items()},
        "optimizer_index": _optimizer_index(trainer, state_dict["model"], states),
        "optimizer": {str(index): {key: _describe(value) for key, value in state.items()}
                      for index, state in states.items()},
    }
    files = {}
    if trainer.data_parallel_rank == 0:
        files[f"args_{stem}.json"] = _json({"cfg": _plain(state_dict["cfg"])})
    files[f"layout_{stem}.json"] = _json(layout)  # last: where it stands, the other stands too
    folder = os.path.join(os.path.dirname(os.path.abspath(filename)), "param_map")
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        _write_atomically(os.path.join(folder, name), content)
    _sync_in_background([os.path.join(folder, name) for name in files] + [folder])


def _model_part(trainer: Any) -> int:
    if trainer.cfg.common.model_parallel_size == 1:
        return 0
    from metaseq.distributed import utils as distributed_utils
    return distributed_utils.get_model_parallel_rank()


def _optimizer_index(trainer: Any, model: dict, states: dict) -> dict:
    """Number of each saved optimizer state -> the key, in the file's model, of the parameter that it belongs to.

    A torch optimizer numbers its parameters through all its param_groups; the parameter itself tells its name.
    """
    if not states:
        return {}
    names = {param: name for name, param in trainer.model.named_parameters()}
    numbered = [param for group in trainer.optimizer.param_groups for param in group["params"]]
    strangers = [str(index) for index in states if numbered[index] not in names]
    if strangers:
        raise ValueError(f"optimizer state {', '.join(strangers)} is of no parameter of the model, as with --fp16 without "
                         "--memory-efficient-fp16")
    return {str(index): _key(names[numbered[index]], model) for index in states}


def _key(name: str, model: dict) -> str:
    """The key under which the file's model holds the parameter that named_parameters() calls `name`."""
    for wrapper in FSDP_WRAPPERS:
        name = name.replace(wrapper, "")
    while name not in model and name.startswith(DDP_WRAPPER):
        name = name[len(DDP_WRAPPER):]
    if name not in model:
        raise ValueError(f"the saved model has no {name}")
    return name


# -------------------------------------------------------------------------------------------------------------- values
def _describe(value: Any) -> Any:
    """Of a tensor its dtype and shape, of anything else itself."""
    if torch.is_tensor(value):
        return {"dtype": _dtype(value.dtype), "shape": list(value.shape)}
    return _plain(value)


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
    if isinstance(value, Namespace):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


# --------------------------------------------------------------------------------------------------------------- files
def _write_atomically(path: str, content: bytes) -> None:
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            file.write(content)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)


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
