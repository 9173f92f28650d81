"""DeepSpeed's goldens, unpacked, and files of torch.save that are changed without the classes that
their pickles name."""

import io
import pickle
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from parammap.formats import allowed
from parammap.tensors.logical import Stored

DATA = Path(__file__).parent.parent / "data/deepspeed"
GPT, BLOOM = "mds_gpt_pp2tp2dp2_bf16", "mds_bloom_pp2tp2dp1_fp16"
PLAIN = {
    "zero2": "plain_bf16_zero2_dp2",
    "bf16 optimizer": "plain_bf16opt_zero1_dp2",
    "zero1": "plain_fp32_zero1_dp3",
}


def unpack(golden: str, folder: Path) -> Path:
    with tarfile.open(DATA / f"{golden}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


class Any_:
    """Stands for any class that is not installed: keeps what it was made of."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if not module.startswith(("deepspeed", "megatron")):
            return super().find_class(module, name)
        own = "stand_in_" + module.replace(".", "_")
        parent = sys.modules.setdefault(own, types.ModuleType(own))
        if not hasattr(parent, name):
            setattr(parent, name, type(name, (Any_,), {"__module__": own}))
            allowed.GLOBALS[own] = allowed.GLOBALS.get(own, frozenset()) | {
                name
            }  # as what it stands for is
        return getattr(parent, name)


_PICKLE = types.SimpleNamespace(
    __name__="stand_ins",
    Unpickler=_Unpickler,
    load=lambda file, **_: _Unpickler(file).load(),
    loads=lambda data, **_: _Unpickler(io.BytesIO(data)).load(),
)


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False, pickle_module=_PICKLE)


def change(path: Path, how: Callable[[Any], object]) -> None:
    """Load a file, change it in place, save it."""
    content = load(path)
    how(content)
    torch.save(content, path)


def same(one: Any, other: Any) -> bool:
    """Whether two trees are the same, tensors bit for bit."""
    if torch.is_tensor(one):
        return (
            torch.is_tensor(other)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(one, other)
        )
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and list(one) == list(other)
            and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, (Any_, types.SimpleNamespace)) or type(one).__name__ == "Namespace":
        return type(one) is type(other) and same(vars(one), vars(other))
    return type(one) is type(other) and one == other


def states(folder: Path) -> dict[str, dict[str, Any]]:
    """A universal checkpoint's tensors by parameter and state, its steps as they are."""
    parameters: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "zero").glob("*/*.pt")):
        content = load(path)
        parameters.setdefault(path.parent.name, {})[path.stem] = (
            content["param"] if isinstance(content, dict) else content
        )
    return parameters


def elements(stored: Stored) -> torch.Tensor:
    """The content of a tensor on disk."""
    raw = b"".join(
        Path(e.file).read_bytes()[e.offset : e.offset + e.nbytes] for e in stored.extents
    )
    return torch.frombuffer(bytearray(raw), dtype=getattr(torch, stored.dtype)).reshape(
        stored.shape
    )


def recut(folder: Path, dp: int) -> None:
    """Cut the optimizer's shards of a step's folder over `dp` ranks, as stage_1_and_2.py does: a
    group's parameters one after the other, padded to a multiple of 2 · dp, in dp equal parts; those
    of fp32 without the padding at the end."""
    for model in sorted(folder.glob("mp_rank_*")):
        shapes = load(model)["param_shapes"]
        paths = sorted(folder.glob(f"*zero_pp_rank_*_{model.name[:10]}_optim_states.pt"))
        shards = [load(path)["optimizer_state_dict"] for path in paths]
        new = [
            {
                "base_optimizer_state": {
                    "state": {},
                    "param_groups": shards[0]["base_optimizer_state"]["param_groups"],
                },
                "single_partition_of_fp32_groups": [],
                "partition_count": [dp] * len(shapes),
                "ds_version": "0.19.8",
            }
            for _ in range(dp)
        ]
        for number, group in enumerate(shapes):
            total = sum(shape.numel() for shape in group.values())
            size = -(-total // (2 * dp)) * 2
            own = [shard["base_optimizer_state"]["state"][number] for shard in shards]
            flat = {
                "exp_avg": [one["exp_avg"] for one in own],
                "exp_avg_sq": [one["exp_avg_sq"] for one in own],
                "fp32": [shard["single_partition_of_fp32_groups"][number] for shard in shards],
            }
            padded = {
                key: torch.nn.functional.pad(
                    torch.cat(parts)[:total], (0, size * dp - total), value=7.0
                )
                for key, parts in flat.items()
            }
            for rank, shard in enumerate(new):
                part = {
                    key: whole[rank * size : (rank + 1) * size].clone()
                    for key, whole in padded.items()
                }
                shard["single_partition_of_fp32_groups"].append(
                    part.pop("fp32")[: max(total - rank * size, 0)].clone()
                )
                shard["base_optimizer_state"]["state"][number] = {**part, "step": own[0]["step"]}
        for path in paths:
            path.unlink()
        for rank, shard in enumerate(new):
            torch.save(
                {"optimizer_state_dict": shard},
                folder / f"zero_pp_rank_{rank}_{model.name[:10]}_optim_states.pt",
            )
        change(model, lambda content: content.update(dp_world_size=dp))
