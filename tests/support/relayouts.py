"""The changes of layout that tests/live/test_reshard_live.py makes: what is trained, how it is laid
out, and how anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from examples.tiny.whole import Sizes
from tests.support.variants import CORES, QUICK_CORES

LATER = ("0.12.3", "0.16.1")
#: sizes that neither 2 nor 3 divides, and small buckets: at least three of them, padded in every
#: release
BUCKETS: dict[str, Any] = {"layers": 4, "hidden": 70, "heads": 2, "bucket": 20_000, "untie": True}
GATED: dict[str, Any] = {
    "layers": 4,
    "swiglu": True,
    "gqa": 4,
    "untie": True,
    "no_bias": True,
    "rope": True,
}
EXPERTS: dict[str, Any] = {
    "layers": 2,
    "hidden": 64,
    "heads": 4,
    "no_bias": True,
    "experts": 4,
    "swiglu": True,
}


class Target(NamedTuple):
    """`cores`: the releases that can train in it; `quick`: those of them that the quick suite
    takes."""

    sizes: Sizes
    cores: tuple[str, ...] = CORES
    quick: tuple[str, ...] = ()


class Case(NamedTuple):
    """Options of examples/train_tiny.py without the layout's; the global batch is the same in every
    layout."""

    options: dict[str, Any]
    source: Sizes
    targets: dict[str, Target]
    dtype: str = "fp32"
    global_batch: int = 16


CASES = {
    "gpt": Case(
        {"layers": 8},
        Sizes(tp=2, pp=2),
        {
            "same": Target(Sizes(tp=2, pp=2)),
            "tp1pp1": Target(Sizes(), quick=QUICK_CORES),
            "tp4pp1": Target(Sizes(tp=4), quick=QUICK_CORES),
            "tp1pp4": Target(Sizes(pp=4), quick=("0.16.1",)),
            "uneven": Target(Sizes(tp=2, pp=3, stage_layers=(4, 2, 2)), cores=LATER),
            "pp2vpp2": Target(Sizes(pp=2, vpp=2), cores=LATER, quick=("0.16.1",)),
            "pp4vpp2": Target(Sizes(pp=4, vpp=2), quick=("0.6.0",)),
            "dp2": Target(Sizes(tp=2, dp=2)),
        },
    ),
    "llama": Case(
        {**GATED, "rmsnorm": True},
        Sizes(tp=2, pp=2),
        {
            "tp1pp1": Target(Sizes(), LATER),
            "tp4pp1": Target(Sizes(tp=4), LATER, quick=("0.16.1",)),
            "tp1pp4": Target(Sizes(pp=4), LATER),
        },
    ),
    "gated": Case(
        GATED,
        Sizes(tp=2, pp=2),
        {
            "tp1pp1": Target(Sizes()),
            "tp4pp1": Target(Sizes(tp=4), quick=("0.6.0",)),
            "tp1pp4": Target(Sizes(pp=4)),
        },
    ),
    "moe": Case(
        EXPERTS,
        Sizes(dp=2, ep=2),
        {
            "ep1": Target(Sizes(dp=2), quick=QUICK_CORES),
            "ep4": Target(Sizes(dp=4, ep=4), quick=QUICK_CORES),
            # not 0.6, where each tp rank balances the load of its own part of the sequence: another
            # loss
            "tp2ep2": Target(Sizes(tp=2, dp=2, ep=2), cores=("0.8.0", *LATER)),
            "pp2ep1dp1": Target(Sizes(pp=2)),
        },
    ),
    "shared_experts": Case(
        {**EXPERTS, "shared_expert": 96},
        Sizes(dp=2, ep=2),
        {
            "ep1": Target(Sizes(), LATER),
            "tp2ep2": Target(Sizes(tp=2, dp=2, ep=2), LATER),
        },
    ),
    "grouped_experts": Case(
        {**EXPERTS, "grouped_gemm": True},
        Sizes(dp=2, ep=2),
        {
            "ep1": Target(Sizes(), quick=("0.16.1",)),
            "ep4": Target(Sizes(dp=4, ep=4)),
            "tp2ep2": Target(Sizes(tp=2, dp=2, ep=2), cores=("0.8.0", *LATER)),
        },
        dtype="bf16",
    ),
    "buckets": Case(
        BUCKETS,
        Sizes(tp=2, dp=2),
        {
            "pp2dp3": Target(Sizes(pp=2, dp=3), quick=QUICK_CORES),
            "tp2pp2": Target(Sizes(tp=2, pp=2)),
        },
        dtype="bf16",
        global_batch=12,
    ),
    "vocabulary": Case(
        {"layers": 2, "vocab": 200},
        Sizes(tp=2),
        {
            "tp1": Target(Sizes(), quick=("0.16.1",)),
            "tp4": Target(Sizes(tp=4)),
        },
    ),
}
#: where the padded vocabulary changes, and losses with it
PADDING = ("vocabulary",)
#: in bf16 the last bits decide for some tokens which expert they go to, and so their whole loss
ROUTED_IN_BF16 = ("grouped_experts",)

#: runs of tests/support/variants.py and the layouts in which MindSpore is to have them; those with
#: True in the quick suite
FOR_MINDSPORE: list[tuple[str, Sizes, bool]] = [
    ("tp2pp2", Sizes(tp=4), True),
    ("tp2pp2", Sizes(pp=4), False),
    ("tp2pp2", Sizes(), True),
    ("tp2pp2", Sizes(tp=2, pp=2, dp=2), False),
    ("vpp", Sizes(tp=2, pp=2), False),
    ("gated_gqa", Sizes(tp=4), True),
    ("gated_gqa", Sizes(pp=4), False),
    ("llama", Sizes(tp=4), False),
    ("moe_ep2", Sizes(dp=4, ep=4), False),
    ("moe_swiglu", Sizes(), True),
    ("moe_swiglu", Sizes(tp=2, dp=2, ep=2), False),
    ("padded_vocab", Sizes(), False),
    ("padded_vocab", Sizes(tp=4), False),
]


def relayouts(*names: str) -> Iterator[tuple[str, str, str, bool]]:
    """(release, case, target, whether the quick suite has it) of those cases, or of all."""
    for name in names or CASES:
        for target, (_, cores, quick) in CASES[name].targets.items():
            for core in cores:
                yield core, name, target, core in quick
