"""The training runs that the tests are about: options of examples/train_tiny.py by name, and who
has them."""

from __future__ import annotations

from typing import Any

CORES = ("0.6.0", "0.8.0", "0.12.3", "0.16.1")

VARIANTS: dict[str, dict[str, Any]] = {
    "tp2pp2": {"tp": 2, "pp": 2},
    "vpp": {"pp": 4, "vpp": 2},
    "uneven": {"pp": 3, "layers": 7, "first_stage_layers": 3},
    "uneven_vpp": {"pp": 3, "vpp": 2, "layers": 8, "first_stage_layers": 4},
    "gaps": {"tp": 4, "layers": 1},
    "dp3_padded": {"dp": 3, "layers": 2},
    "dp2_busbw": {"dp": 2, "layers": 2, "pad_busbw": True},
    "fp32_own_group": {"dp": 2, "layers": 2, "no_bias": True, "fp32": "norm"},
    "fp32_mixed_group": {"layers": 2, "no_bias": True, "fp32": "input_layernorm"},
    "moe_ep2": {"dp": 4, "ep": 2, "experts": 4, "layers": 2, "no_bias": True},
    "moe_tp2_ep2": {"tp": 2, "dp": 2, "ep": 2, "experts": 4, "layers": 2, "no_bias": True},
    "llama": {
        "tp": 2,
        "pp": 2,
        "layers": 4,
        "rmsnorm": True,
        "swiglu": True,
        "gqa": 4,
        "untie": True,
        "no_bias": True,
        "rope": True,
    },
    "gated_gqa": {
        "tp": 2,
        "pp": 2,
        "layers": 4,
        "swiglu": True,
        "gqa": 4,
        "untie": True,
        "no_bias": True,
        "rope": True,
    },
    "moe_swiglu": {"dp": 2, "ep": 2, "experts": 4, "layers": 2, "no_bias": True, "swiglu": True},
    "padded_vocab": {"tp": 2, "layers": 2, "vocab": 200},
    "fp16": {"tp": 2, "layers": 2, "dtype": "fp16"},
    "fp32": {"tp": 2, "layers": 2, "dtype": "fp32"},
    "stale": {"dp": 2, "layers": 2, "overlap_param_gather": True},
    "no_args": {"pp": 2, "layers": 2, "no_args": True},
}

#: variants that not every release can train, or saves otherwise
ONLY = {
    "uneven": ("0.12.3", "0.16.1"),
    "uneven_vpp": ("0.12.3", "0.16.1"),
    "gaps": ("0.8.0", "0.12.3", "0.16.1"),
    "dp2_busbw": ("0.12.3", "0.16.1"),
    "llama": ("0.12.3", "0.16.1"),
    "stale": ("0.6.0",),
}

#: saved wrongly by Megatron itself: a param group's optimizer state is permuted, or 16-bit weights
#: are one step old
DEFECTS = ("fp32_mixed_group", "stale")


#: in the quick suite, for one release of each generation of distrib_optim.pt; the others are marked
#: full
QUICK_CORES = ("0.6.0", "0.16.1")
QUICK = (
    "tp2pp2",
    "vpp",
    "uneven",
    "uneven_vpp",
    "gaps",
    "dp3_padded",
    "fp32_own_group",
    "fp32_mixed_group",
    "moe_ep2",
    "stale",
)


def is_quick(core: str, variant: str) -> bool:
    return core in QUICK_CORES and variant in QUICK


def runs() -> list[tuple[str, str]]:
    """(release, variant) of every run that can be made."""
    return [
        (core, variant)
        for core in CORES
        for variant in VARIANTS
        if core in ONLY.get(variant, CORES)
    ]
