"""The matrix of tests/live/test_live_matrix.py: what is trained, in which layout and format it is
saved, and what it becomes.

Local attention cannot compute multi-latent attention in any release (its DotProductAttention takes
no k_channels), and context parallelism asks for Transformer Engine; so those cells do not exist.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from examples.tiny.whole import Sizes

CORE = "0.16.1"
#: steps before the save, and after it
BEFORE, AFTER = 3, 3

SMALL: dict[str, Any] = {
    "layers": 4,
    "hidden": 64,
    "heads": 4,
    "dtype": "fp32",
    "global_batch": 16,
    "plain": True,
}
LLAMA: dict[str, Any] = {
    "rmsnorm": True,
    "swiglu": True,
    "gqa": 2,
    "untie": True,
    "no_bias": True,
    "rope": True,
}
EXPERTS: dict[str, Any] = {"experts": 4, "swiglu": True, "no_bias": True}
LATENT: dict[str, Any] = {
    "mla": True,
    "rmsnorm": True,
    "swiglu": True,
    "untie": True,
    "no_bias": True,
    "rope": True,
}
TE: dict[str, Any] = {"transformer_impl": "transformer_engine"}

#: options of examples/train_tiny.py
MODELS: dict[str, dict[str, Any]] = {
    "local-gpt": {},
    "local-llama": LLAMA,
    "local-moe": EXPERTS,
    "te-gpt": TE,
    "te-gpt-bf16": {**TE, "dtype": "bf16"},
    "te-gpt-none": {**TE, "extra_state": "none"},
    "te-gpt-bytesio": {**TE, "extra_state": "bytesio"},
    "te-gpt-fp8": {**TE, "extra_state": "fp8"},
    "te-llama": {**TE, **LLAMA},
    "te-moe": {**TE, **EXPERTS, "grouped_gemm": True},
    "te-mla": {**TE, **LATENT, "core": "0.17.0"},
    "te-mla-0.16": {**TE, **LATENT},
}
#: of these, two routes
VARIANTS = ("te-gpt-bf16", "te-gpt-none", "te-gpt-bytesio", "te-gpt-fp8", "te-mla-0.16")
#: up to core 0.16 what latent attention has copies of on all tp ranks counts once for each of them
#: in the gradients' norm, and so in clipping: with another tp, Megatron itself goes on otherwise
NORM_BY_TP = ("te-mla-0.16",)

#: the buckets of dp ranks, as Megatron-LM saves from 0.15 on unless told otherwise, or tensors of
#: the model's shapes: then one bucket, because megatron-core 0.15 to 0.19 saves what follows padded
#: ones wrongly (NVIDIA/Megatron-LM#5077)
FORMATS: dict[str, dict[str, Any]] = {
    "torch": {"ckpt_format": "torch", "bucket": 20_000},
    "dist-buckets": {"ckpt_format": "torch_dist", "bucket": 20_000, "dist_optim": "dp_reshardable"},
    "dist": {"ckpt_format": "torch_dist", "bucket": 10**8},
    "dist-one-writer": {
        "ckpt_format": "torch_dist",
        "bucket": 10**8,
        "no_ckpt_fully_parallel_save": True,
    },
}

LAYOUTS = {
    "dp1": Sizes(),
    "dp2": Sizes(dp=2),
    "dp4": Sizes(dp=4),
    "cp2": Sizes(cp=2),
    "tp2": Sizes(tp=2),
    "pp2": Sizes(pp=2),
    "tp2dp2": Sizes(tp=2, dp=2),
    "pp2dp2": Sizes(pp=2, dp=2),
    "ep2dp2": Sizes(dp=2, ep=2),
    "ep4dp4": Sizes(dp=4, ep=4),
}
#: the frameworks that a checkpoint passes; the last one's format is resumed
CHAINS = {
    "torch": ("megatron",),
    "torch_dist": ("megatron-dist",),
    "mindspore": ("mindspore", "megatron"),
}
#: MindSpeed-Core-MS has no latent attention, so such a model keeps Megatron-LM's names there
MEGATRON_NAMES = ("te-mla", "te-mla-0.16")
#: layout of the source, chain, layout in which training goes on
ROUTES = (
    ("dp2", "torch", "tp2"),
    ("dp2", "torch_dist", "tp2"),
    ("dp4", "torch", "dp1"),
    ("dp4", "mindspore", "pp2dp2"),
    ("cp2", "torch", "dp2"),
    ("tp2dp2", "torch", "pp2"),
    ("tp2dp2", "mindspore", "dp1"),
    ("pp2dp2", "torch", "dp1"),
    ("pp2dp2", "torch_dist", "tp2"),
    ("ep2dp2", "torch", "dp2"),
    ("ep2dp2", "torch", "ep4dp4"),
)


class Cell(NamedTuple):
    model: str
    format: str
    layout: str
    chain: str
    target: str

    def options(self, layout: str | None = None, **more: Any) -> dict[str, Any]:
        """Of examples/train_tiny.py: the source, or another run of the same model in `layout`."""
        sizes = LAYOUTS[layout or self.layout]._asdict()
        del sizes["stage_layers"]
        return {
            "core": CORE,
            **SMALL,
            **MODELS[self.model],
            **FORMATS[self.format],
            **sizes,
            **more,
        }

    def flags(self, framework: str) -> tuple[str, ...]:
        """Of the command line that converts to a framework on the way."""
        is_renamed = framework == "mindspore" and self.model in MEGATRON_NAMES
        return ("--names", "megatron") if is_renamed else ()


#: in the quick suite: each way in which a conversion can go wrong, once
QUICK = [
    # the order of the keys in .metadata is not that of the buckets
    Cell("te-gpt", "dist-buckets", "dp4", "torch", "dp1"),
    Cell("te-llama", "dist", "tp2dp2", "torch", "pp2"),
    Cell("te-llama", "dist-buckets", "cp2", "torch", "dp2"),
    Cell("local-gpt", "dist", "pp2dp2", "torch", "dp1"),
    Cell("local-llama", "dist", "dp4", "mindspore", "pp2dp2"),
    # extra states are no weights
    Cell("te-gpt", "torch", "dp2", "torch_dist", "tp2"),
    Cell("te-gpt", "dist-one-writer", "tp2dp2", "mindspore", "dp1"),
    Cell("te-gpt-fp8", "dist", "dp2", "torch", "tp2"),
    # experts of Transformer Engine: cut by the family's table, whatever Megatron marked
    Cell("te-moe", "torch", "ep2dp2", "torch", "dp2"),
    Cell("te-moe", "dist-buckets", "ep2dp2", "torch", "ep4dp4"),
    # the down-projections of latent attention are not cut
    Cell("te-mla", "torch", "tp2dp2", "torch", "pp2"),
    Cell("te-mla", "dist", "dp2", "torch", "tp2"),
]


def cells() -> Iterator[Cell]:
    """Every cell that exists."""
    for model, form, route in itertools.product(MODELS, FORMATS, ROUTES):
        is_sound = ("ep" not in route[0] or "moe" in model) and (
            "cp" not in route[0] or model.startswith("te")
        )
        is_wanted = model not in VARIANTS or (route[0] == "dp2" and form in ("torch", "dist"))
        if is_sound and is_wanted:
            yield Cell(model, form, *route)


#: what has weights only: a source, the frameworks that it passes, and flags for each of them
WEIGHTS: dict[str, tuple[Cell, tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "grouped-experts": (
        Cell("te-moe", "dist", "ep2dp2", "torch", "dp2"),
        ("megatron",),
        {"megatron": ("--weights-only",)},
    ),
    "by-transformers": (
        Cell("te-llama", "dist", "tp2dp2", "torch", "tp2"),
        ("transformers", "megatron"),
        {"transformers": ("--weights-only",), "megatron": ("--make-vocab-size-divisible-by", "16")},
    ),
}


def buckets(save: Path) -> dict[str, Any]:
    """By sidecar, where each parameter lies in the buffers of each optimizer."""
    files = sorted((save / "param_map").glob("layout_*.json"))
    layouts = {file.name: json.loads(file.read_text()) for file in files}
    return {
        name: [
            [
                {
                    **buffer,
                    "params": [
                        (param["name"], param["start"], param["end"], param["bucket"])
                        for param in buffer["params"]
                    ],
                }
                for buffer in optimizer["buffers"]
            ]
            for optimizer in layout["optimizers"]
            if optimizer
        ]
        for name, layout in layouts.items()
    }
