"""What has to be changed inside megatron-core itself: two functions that assume Transformer
Engine."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType


def patch_megatron() -> None:
    """Call it once megatron can be imported. Releases that lack a module, or do not need the
    change, are left alone."""
    fp8_utils = _module("megatron.core.fp8_utils")
    if fp8_utils is not None and not getattr(fp8_utils, "HAVE_TE", True):
        # 0.12: raises without Transformer Engine even where there is no fp8 parameter
        fp8_utils._quantize_param_shard_impl = lambda *args, **kwargs: None
    moe_utils = _module("megatron.core.transformer.moe.moe_utils")
    if moe_utils is not None and not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = (
            None  # 0.16: the name is defined only where Transformer Engine is installed
        )
    # 0.16 warns at each fork that the CPU's generator moved; here it is the GPU's
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name and not name.startswith(f"{error.name}."):
            raise
        return None
