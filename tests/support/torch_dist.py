"""What the tests of test_torch_dist share with others."""

from __future__ import annotations

from pathlib import Path

from parammap.frameworks import registry
from parammap.proof import verify

DENSE = {"tp": 2, "pp": 2, "layers": 4}

EXPERTS = {"tp": 2, "dp": 2, "ep": 2, "experts": 4, "layers": 2, "no_bias": True}

LLAMA = {
    **DENSE,
    "rmsnorm": True,
    "swiglu": True,
    "gqa": 4,
    "untie": True,
    "no_bias": True,
    "rope": True,
}


def digests(path: Path, **flags) -> dict[tuple[str, str, str, tuple[int, ...]], set[int]]:
    return {
        (tensor.state, tensor.name, tensor.dtype, tensor.shape): set(summed.digests)
        for tensor, summed in verify.digests(registry.read(path, **flags).index, 1).items()
    }
