"""What the tests of test_megatron_lm share with others."""

from __future__ import annotations

import importlib.util
import os

import pytest

CHECKOUT = os.environ.get("MEGATRON_LM")

MISSING = [name for name in ("regex", "yaml", "pydantic") if importlib.util.find_spec(name) is None]

needs_checkout = pytest.mark.skipif(
    not CHECKOUT, reason="MEGATRON_LM does not name a git checkout of Megatron-LM"
)

needs_its_packages = pytest.mark.skipif(
    bool(CHECKOUT and MISSING),
    reason=f"pretrain_gpt.py needs packages that are not installed: {', '.join(MISSING)}",
)

TP2_PP2 = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --overlap-grad-reduce"

MOCK_VOCAB = (
    "--vocab-size 4095"  # mock data of 0.8 on has that many tokens; tp hides what is out of range
)
