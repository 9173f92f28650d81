"""Loads shards into fairscale's own FSDP on a CPU and says what it then holds.

`python -m tests.support.fsdp_load OPTIONS.json`: a list of fsdp.Options. Each process builds the
model of its part and loads its shard with `load_local_state_dict`; `loaded/part{P}.pt` is {role:
{name: tensor}} by FSDP's `state_dict()` of the gathered model, as `truth/part{P}.pt` of
tests.support.fsdp is. A shard's metadata must be what FSDP itself says of it, and an optimizer of
the same model must accept its states."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support import fsdp
from tests.support.fsdp import Options


def run(kind: type, options: Options, part: int, shard: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=shard, world_size=options.shards
    )
    folder, dtype = (
        Path(options.folder),
        torch.float16 if options.dtype == "float16" else torch.float32,
    )
    content = torch.load(
        folder / f"{options.name}-model_part-{part}-shard{shard}.pt", weights_only=False
    )
    loaded = {}
    model = fsdp.sharded(kind, options, part, dtype)
    model.state_dict()  # gathers once, without which fairscale 0.4.13 cannot free what it loads
    model.load_local_state_dict(content["model"])
    if model.local_metadata_dict() != content["shard_metadata"]:
        sys.exit(
            f"part {part} shard {shard}: {content['shard_metadata']} and not "
            f"{model.local_metadata_dict()}"
        )
    loaded["weight"] = {
        name: tensor.to(getattr(torch, options.dtype))
        for name, tensor in model.state_dict().items()
    }
    if options.optimizer:
        optimizer = fsdp.Adam(model.parameters())
        optimizer.load_state_dict(
            {key: content["last_optimizer_state"][key] for key in ("state", "param_groups")}
        )
        for role in ("exp_avg", "exp_avg_sq"):
            model_copy = fsdp.sharded(kind, options, part, torch.float32)
            saved = content["last_optimizer_state"]["state"]
            for number, (own, there) in enumerate(
                zip(model_copy.parameters(), model.parameters(), strict=True)
            ):
                assert (
                    saved[number][role].shape == there.shape
                    and saved[number][role].dtype == torch.float32
                )
                own.data.copy_(saved[number][role])
            loaded[role] = {
                name: tensor
                for name, tensor in model_copy.state_dict().items()
                if not name.endswith(fsdp.BUFFERS)
            }
    if shard == 0:
        (folder / "loaded").mkdir(exist_ok=True)
        torch.save(loaded, folder / "loaded" / f"part{part}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    fsdp.run = run
    fsdp.main(sys.argv[1])
