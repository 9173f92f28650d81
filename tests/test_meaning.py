"""Meaning: a GPT written in MindSpore that loads the converted checkpoint computes Megatron's losses.

Not how bytes lie but what they are: a fused projection read in another order of heads, a gate taken for a value would
load without a word. megatron-core trains in fp32 and then computes a batch in the same process.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from convert.cli import main
from tests.lab import mindspore_gpt

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


@pytest.mark.parametrize("case", CASES)
def test_the_converted_model_computes_megatrons_losses(trained, tmp_path, case):
    run = trained(**CASES[case])
    assert main(["convert", str(run.path), str(tmp_path / "out"), "--to", "mindspore"]) == 0
    losses = run.path / "truth/losses_dp000.npz"
    args = run.truths()[0].meta["args"]
    computed = mindspore_gpt.run(tmp_path / "out", args, losses, tmp_path)
    expected = np.load(losses)["evaluated"]
    assert computed["right"].shape == expected.shape and expected.std() > 0.05
    assert np.abs(computed["right"] - expected).max() < ROUND_OFF
    assert np.abs(computed["wrong"] - expected).max() > 0.1, "this would not see heads in the wrong order"
