"""What the tests of test_meaning share with others."""

from __future__ import annotations

from typing import Any

PLAIN = {"dtype": "fp32", "plain": True, "steps": 6, "hidden": 64, "heads": 4, "layers": 2}

TP2_PP2 = {**PLAIN, "tp": 2, "pp": 2, "layers": 4}

LLAMA = {"rmsnorm": True, "swiglu": True, "gqa": 2, "untie": True, "no_bias": True, "rope": True}

CASES: dict[str, dict[str, Any]] = {
    "gpt": {"core": "0.16.1", **PLAIN},
    "gpt-tp2pp2": {"core": "0.16.1", **TP2_PP2},
    "gpt-tp2pp2-0.6": {"core": "0.6.0", **TP2_PP2},
    "llama-tp2pp2": {"core": "0.16.1", **TP2_PP2, **LLAMA},
}

#: of a loss near 5; fp32 sums in another order
ROUND_OFF = 5e-6
