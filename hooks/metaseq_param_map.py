# SPDX-License-Identifier: Apache-2.0

"""Write down, at every metaseq save, which parameters each flat shard holds and which one each
optimizer state is of.

A shard file says the first only inside a pickle, and loses it when it is resharded, and the second
not at all: its optimizer states are numbered. save_param_map(), called in metaseq/trainer.py
save_checkpoint(), stores both, and the configuration, as JSON without pickled classes in
`<save_dir>/param_map/`. It communicates with no other rank, touches no GPU memory and never raises:
training goes on whatever happens here.

The ParamMap project maintains this file, in hooks/; patches/metaseq_param_map.patch adds it to
metaseq."""

import os
import sys
from typing import Any, Dict

import torch

from parammap.hooks.sidecar_files import (
    NoSidecar,
    dtype_name,
    harmless,
    sync_in_background,
    to_json,
    to_plain,
    write_files,
)

SCHEMA, SCHEMA_VERSION = "parammap.metaseq", 1
FSDP_WRAPPERS = (
    "_fsdp_wrapped_module.",
    "_fpw_module.",
)  # what fairscale puts into the paths of its modules
DDP_WRAPPER = "module."


@harmless
def save_param_map(trainer: Any, state_dict: Dict[Any, Any], filename: str) -> None:
    """Write the sidecars of the file that this rank is about to save; warn in one line why not, if
    not.

    trainer: metaseq.trainer.Trainer.
    state_dict: all that the file will hold, on the CPU and in its final dtypes.
    filename: path of the file, `<save_dir>/checkpoint_….pt`.
    """
    if trainer.should_save_checkpoint_on_current_rank:
        _refuse_unknown(trainer, state_dict)
        _save(trainer, state_dict, filename)


def _refuse_unknown(trainer: Any, state_dict: Dict[Any, Any]) -> None:
    if trainer.is_fsdp and "shard_metadata" not in state_dict:
        raise NoSidecar(
            "without --use-sharded-state it holds no shards, and names its optimizer states itself"
        )
    if state_dict.get("last_optimizer_state") is not None and not hasattr(
        trainer.optimizer, "param_groups"
    ):
        raise NoSidecar(f"optimizer {type(trainer.optimizer).__name__} has no param_groups")


def _save(trainer: Any, state_dict: Dict[Any, Any], filename: str) -> None:
    file = os.path.basename(filename)
    stem, num_updates = (
        os.path.splitext(file)[0],
        state_dict["optimizer_history"][-1]["num_updates"],
    )
    shard_metadata = state_dict.get("shard_metadata")
    states = (state_dict.get("last_optimizer_state") or {}).get("state", {})
    layout = {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "framework": {
            "name": "metaseq",
            "torch_version": str(torch.__version__),
            "fairscale_version": getattr(sys.modules.get("fairscale"), "__version__", None),
        },
        "file": file,
        "num_updates": num_updates,
        "model_part": _model_part(trainer),
        "model_parallel_size": trainer.cfg.common.model_parallel_size,
        "shard": None if shard_metadata is None else trainer.data_parallel_rank,
        "data_parallel_size": trainer.data_parallel_world_size,
        "shard_metadata": to_plain(shard_metadata),
        "model": {key: _describe(value) for key, value in state_dict["model"].items()},
        "optimizer_index": _optimizer_index(trainer, state_dict["model"], states),
        "optimizer": {
            str(index): {key: _describe(value) for key, value in state.items()}
            for index, state in states.items()
        },
    }
    files = {}
    if trainer.data_parallel_rank == 0:
        files[f"args_{stem}.json"] = to_json({"cfg": to_plain(state_dict["cfg"])})
    files[f"layout_{stem}.json"] = to_json(layout)  # last: where it stands, the other stands too
    folder = os.path.join(os.path.dirname(os.path.abspath(filename)), "param_map")
    sync_in_background(write_files(folder, files))


def _model_part(trainer: Any) -> int:
    if trainer.cfg.common.model_parallel_size == 1:
        return 0
    from metaseq.distributed import utils as distributed_utils

    return int(distributed_utils.get_model_parallel_rank())


def _optimizer_index(trainer: Any, model: Dict[Any, Any], states: Dict[Any, Any]) -> Dict[str, str]:
    """Number of each saved optimizer state -> the key, in the file's model, of the parameter that
    it belongs to.

    A torch optimizer numbers its parameters through all its param_groups; the parameter itself
    tells its name."""
    if not states:
        return {}
    names = {param: name for name, param in trainer.model.named_parameters()}
    numbered = [param for group in trainer.optimizer.param_groups for param in group["params"]]
    strangers = [str(index) for index in states if numbered[index] not in names]
    if strangers:
        raise ValueError(
            f"optimizer state {', '.join(strangers)} is of no parameter of the model, as with "
            f"--fp16 without "
            "--memory-efficient-fp16"
        )
    return {str(index): _key(names[numbered[index]], model) for index in states}


def _key(name: str, model: Dict[Any, Any]) -> str:
    """The key under which the file's model holds the parameter that named_parameters() calls
    `name`."""
    for wrapper in FSDP_WRAPPERS:
        name = name.replace(wrapper, "")
    while name not in model and name.startswith(DDP_WRAPPER):
        name = name[len(DDP_WRAPPER) :]
    if name not in model:
        raise ValueError(f"the saved model has no {name}")
    return name


def _describe(value: Any) -> Any:
    """Of a tensor its dtype and shape, of anything else itself."""
    if torch.is_tensor(value):
        return {"dtype": dtype_name(value.dtype), "shape": list(value.shape)}
    return to_plain(value)
