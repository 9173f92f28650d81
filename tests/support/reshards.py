"""What the tests of test_reshard share with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from examples.tiny.trained import Trained
from parammap.checkpoint.manifest import MANIFEST
from parammap.job import conversion
from parammap.job.request import Request
from tests.support.torch_load import torch_load
from tests.support.way_back import (
    assert_equal,
    assert_optimizer_equal,
    layouts,
    live_of_run,
    rank_folders,
)

SMALL = {"layers": 4, "hidden": 64, "heads": 8, "bucket": 20_000}

LLAMA = {**SMALL, "gqa": 4, "swiglu": True, "untie": True, "no_bias": True, "rope": True}

#: options of examples/train_tiny.py by name; all have at least three buckets on their first stage
RUNS: dict[str, dict[str, Any]] = {
    "tied": {"core": "0.16.1", **SMALL, "tp": 2, "pp": 2, "dp": 2},
    "tied_0.6": {"core": "0.6.0", **SMALL, "tp": 2, "pp": 2, "dp": 2},
    "llama": {
        "core": "0.16.1",
        **LLAMA,
        "rmsnorm": True,
        "tp": 2,
        "pp": 2,
        "dp": 3,
        "bucket": 10_000,
    },
    "gated_0.6": {"core": "0.6.0", **LLAMA, "tp": 4, "pp": 1, "dp": 3, "bucket": 10_000},
    "padded": {"core": "0.16.1", **SMALL, "tp": 2, "pp": 1, "dp": 3, "vocab": 200, "hidden": 72},
    "moe": {
        "core": "0.16.1",
        **SMALL,
        "tp": 2,
        "dp": 2,
        "ep": 2,
        "experts": 4,
        "swiglu": True,
        "no_bias": True,
    },
    "moe_0.6": {
        "core": "0.6.0",
        **SMALL,
        "layers": 2,
        "pp": 2,
        "dp": 2,
        "ep": 2,
        "experts": 4,
        "no_bias": True,
    },
    "uneven": {"core": "0.16.1", **SMALL, "pp": 3, "layers": 7, "first_stage_layers": 3, "dp": 2},
    "interleaved": {"core": "0.16.1", **SMALL, "pp": 4, "vpp": 2, "layers": 8, "untie": True},
}

#: arguments that may differ: a rank's number; the last stage's layers, which need not be said where
#: the first's are
OF_A_RANK = ("rank", "local_rank", "decoder_last_pipeline_num_layers")


class Wanted(NamedTuple):
    """A parallel layout as `parammap convert` is told it; `stage_layers` counts the layers of each
    chunk."""

    sizes: dict[str, int]
    stage_layers: tuple[int, ...]
    divisor: int

    def __str__(self) -> str:
        return (
            "".join(f"{name}{size}" for name, size in self.sizes.items())
            + "-"
            + ".".join(map(str, self.stage_layers))
        )


def convert(
    source: Path, target: Path, wanted: Wanted, to: str = "megatron", **options: Any
) -> dict[str, Any]:
    """Its manifest."""
    report = conversion.convert(
        Request(
            source=source,
            target=target,
            to=to,
            sizes=wanted.sizes,
            workers=1,
            stage_layers=wanted.stage_layers,
            vocab_divisible_by=wanted.divisor,
            **options,
        )
    )
    assert report.status == 0, report.lines
    return json.loads((target / MANIFEST).read_text())


def digests(manifest: dict[str, Any]) -> dict[tuple[str, str], tuple[str, tuple[int, ...], str]]:
    """By role and name; the vocabulary's padding is each layout's own."""
    return {
        (entry["role"], entry["name"]): (entry["dtype"], tuple(entry["shape"]), entry["digest"])
        for entry in manifest["digests"]
        if not entry["name"].endswith(".padding")
    }


def assert_same(ours: Path, theirs: Trained, *, lost_ranks: bool) -> int:
    """Returns how many elements of optimizer state were compared."""
    mine, original = rank_folders(ours), rank_folders(theirs.path)
    assert set(mine) == set(original)
    states = [
        torch_load(folder / "model_optim_rng.pt").pop("rng_state") for folder in original.values()
    ]
    for name, folder in original.items():
        model, expected = (torch_load(path / "model_optim_rng.pt") for path in (mine[name], folder))
        found, state = model.pop("rng_state"), expected.pop("rng_state")
        assert any(is_equal(found, one) for one in (states if lost_ranks else [state]))
        for args in (model["args"], expected["args"]):
            for own in OF_A_RANK:
                delattr(args, own)
        assert_equal(model, expected, name)
        optimizers = [
            torch.load(path / "distrib_optim.pt", weights_only=True)
            for path in (mine[name], folder)
        ]
        assert_optimizer_equal(*optimizers, live_of_run(theirs, name))
    assert known_offline(ours) == known_offline(theirs.path)
    return sum(
        param["end"] - param["start"]
        for layout in layouts(ours).values()
        for param in params_of(layout)
    )


def known_offline(root: Path) -> dict[str, dict[str, Any]]:
    """The layout files without what only the running process knows: its groups, the classes of
    modules and optimizers, what is frozen."""
    files = layouts(root)
    for layout in files.values():
        for chunk in layout["chunks"]:
            chunk.pop("frozen", None)
        for optimizer in filter(None, layout["optimizers"]):
            optimizer.pop("data_parallel_group_idx", None)
            optimizer.pop("inner_class", None)
        for param in params_of(layout):
            param.pop("module", None)
    return files


def is_equal(one: object, other: object) -> bool:
    try:
        assert_equal(one, other)
    except AssertionError:
        return False
    return True


def params_of(layout: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        param
        for optimizer in layout["optimizers"]
        if optimizer
        for buffer in optimizer["buffers"]
        for param in buffer["params"]
    ]
