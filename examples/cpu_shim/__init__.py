"""Lets real Megatron code train on a CPU: everything that would touch a GPU is led to the CPU and
to gloo instead.

Import this package and call `install()` before megatron is imported; call `patch_megatron()` once
it can be. Tried with the wheels megatron-core 0.6.0, 0.8.0, 0.12.3 and 0.16.1, and with
Megatron-LM's own pretrain_gpt.py at cac60ce4, core_r0.8.0, core_r0.12.0 and core_r0.16.0."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault(
    "CUDA_DEVICE_MAX_CONNECTIONS", "1"
)  # Megatron insists on it for tensor parallel

import torch

# torch.optim imports it when first used: now, while torch is unpatched, and once for all ranks
import torch._dynamo

from examples.cpu_shim import collectives, device, stubs
from examples.cpu_shim.megatron import patch_megatron

__all__ = ["install", "patch_megatron"]


def install(
    *, transformer_engine: bool = False, triton: bool = False, cuda_available: bool = False
) -> None:
    """Replace the GPU side of torch, and the GPU-only packages that Megatron imports.

    `transformer_engine`: stub it; megatron-core up to 0.7 imports it always, later ones work
    without. `triton`: stub it; the scripts of Megatron-LM from core_r0.16.0 import it at start-up.
    `cuda_available`: what torch.cuda.is_available() says; the scripts of Megatron-LM refuse to
    start without."""
    torch.compile = eager
    torch.set_num_threads(1)  # one process per rank already fills the cores
    device.install(cuda_available)
    collectives.install()
    stubs.install(transformer_engine, triton)


def eager(function: Any = None, **options: Any) -> Any:
    """torch.compile, and so Megatron's jit_fuser, without a compiler to count on: the function as
    it is."""
    return eager if function is None else function
