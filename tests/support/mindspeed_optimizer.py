"""Save checkpoints with MindSpeed-Core-MS's own distributed optimizer (r0.1.0), without its devices
and communication.

`python tests/support/mindspeed_optimizer.py CHECKOUT OUT`, in its own process: per case, its
ParamAndGradBuffer lays parameters out, its save_opt_shard_strategy writes the strategy, its
state_dict makes each rank's tensors and mindspore.save_checkpoint writes them; OUT/<case>/truth.npz
keeps the tensors before they were cut. Only what asks a device or another process is replaced: the
size of the group, the rank in it, the allocation of a buffer, and the joining of parameters in it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

SHAPES = {
    "m.embedding.weight": (37, 9),
    "m.layers.0.norm.weight": (9,),
    "m.layers.0.mlp.weight": (130, 9),
    "m.layers.0.mlp.bias": (128,),
    "m.layers.1.norm.weight": (2,),
    "m.head.weight": (3, 5, 8),
}
ZERO3 = {"m.zero3.weight": (12, 5)}
#: case: dp, bucket size, memory alignment, parameter dtypes of the buffers, which of its two
#: optimizers
CASES = {
    "dp1": (1, None, True, ["Float32"], "optimizer"),
    "dp2": (2, None, True, ["Float32"], "optimizer"),
    "dp3-buckets": (3, 300, True, ["Float32"], "optimizer"),
    "dp4-bfloat16": (4, 300, True, ["BFloat16"], "optimizer"),
    "dp2-two-buffers": (2, 500, True, ["Float32", "BFloat16"], "optimizer"),
    "dp2-unaligned": (2, 300, False, ["Float32"], "optimizer"),
    "dp3-zero3": (3, 300, True, ["BFloat16"], "ddp"),
}


def _main(checkout: str, out: Path) -> None:
    sys.path.insert(0, checkout)
    for name, (dp, bucket_size, aligned, dtypes, flavour) in CASES.items():
        _case(out / name, dp, bucket_size, aligned, dtypes, flavour)


def _case(
    out: Path, dp: int, bucket_size: int | None, aligned: bool, dtypes: list[str], flavour: str
) -> None:
    import importlib

    import mindspore as ms
    from mindspore.hal import contiguous_tensors_handle

    package = "mindspeed_ms.core." + ("distributed" if flavour == "optimizer" else flavour)
    buffers_module = importlib.import_module(f"{package}.param_and_grad_buffer")
    module = importlib.import_module(f"mindspeed_ms.core.{flavour}.distrib_optimizer")
    optimizer_class, group = module.DistributedOptimizer, "dp-cp-" + "-".join(map(str, range(dp)))
    for one in (buffers_module, module):
        one.get_group_size = lambda group=None: dp
    buffers_module.Tensor = lambda **options: ms.Tensor(**options).init_data()
    contiguous_tensors_handle.combine_tensor_list_contiguous = lambda tensors, enable_mem_align: (
        ms.mint.zeros(100_000)
    )
    shapes = [{f"b{b}.{name}": shape for name, shape in SHAPES.items()} for b in range(len(dtypes))]
    random = np.random.default_rng(dp)
    zero3 = ZERO3 if flavour == "ddp" else {}
    truth = {
        prefix + name: random.normal(size=shape).astype(np.float32)
        for some in (*shapes, zero3)
        for name, shape in some.items()
        for prefix in ("", "exp_avg.", "exp_avg_sq.")
    }
    config = SimpleNamespace(use_distributed_optimizer=True, enable_mem_align=aligned)
    buffers = [
        buffers_module.ParamAndGradBuffer(
            config,
            getattr(ms, dtype.lower()),
            ms.float32,
            [
                ms.Parameter(
                    ms.Tensor(np.zeros(shape, np.float32), getattr(ms, dtype.lower())), name=name
                )
                for name, shape in some.items()
            ],
            group,
            bucket_size,
            {},
            1.0,
        )
        for dtype, some in zip(dtypes, shapes, strict=True)
    ]
    for rank in range(dp):
        for one in (buffers_module, module):
            one.get_rank = lambda group=None, rank=rank: rank
        self = SimpleNamespace(buffers=buffers, data_parallel_group=group, zero3_param=[])
        self.param_ranges_map = [
            optimizer_class._build_buffer_ranges_map(buffer) for buffer in buffers
        ]
        self.param_buffer_dp_views = optimizer_class._get_model_param_buffer_dp_views(self)
        _states(self, truth, zero3, rank, dp)
        strategy = out / f"opt_shard_info/rank_{rank}/dist_opt_shard_info_rank_{rank}-0_0.json"
        strategy.parent.mkdir(parents=True, exist_ok=True)
        optimizer_class.save_opt_shard_strategy(
            self, str(strategy), *([[]] if flavour == "ddp" else [])
        )
        folder = out / f"rank_{rank}"
        folder.mkdir()
        ms.save_checkpoint(
            optimizer_class.state_dict(self),
            str(folder / f"network_rank_{rank}-0_5.ckpt"),
            append_dict={"epoch_num": 0, "step_num": 5},
        )
    np.savez(out / "truth.npz", **truth)


def _states(
    self: SimpleNamespace, truth: dict[str, np.ndarray], zero3: dict, rank: int, dp: int
) -> None:
    """The optimizer's own flat states of this rank: of each parameter the range that its buffers'
    map gives the rank."""
    import mindspore as ms

    slices = {
        param.name: where["range_in_param"]
        for buckets in self.param_ranges_map
        for bucket in buckets
        for param, where in bucket.items()
    }
    flat = {
        prefix: [
            ms.Parameter(ms.Tensor(truth[prefix + name].reshape(-1)[start:end]), name=prefix + name)
            for name, (start, end) in slices.items()
        ]
        for prefix in ("", "exp_avg.", "exp_avg_sq.")
    }
    for prefix, states in flat.items():
        states += [
            ms.Parameter(ms.Tensor(np.split(truth[prefix + name], dp)[rank]), name=prefix + name)
            for name in zero3
        ]
    self.zero3_param = flat[""][len(slices) :]
    self.param_idx_in_opt = {param.name: number for number, param in enumerate(flat[""])}
    self.optimizer = SimpleNamespace(
        parameters=flat[""],
        exp_avg=flat["exp_avg."],
        exp_avg_sq=flat["exp_avg_sq."],
        state_step=ms.Parameter(ms.Tensor([5], ms.float32), name="state_step"),
        param_groups=[{"weight_decay": 0.1}],
        lrs=[ms.Parameter(ms.Tensor(1e-3, ms.float64), name="learning_rate_group_0")],
    )


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
