"""Meaning: a GPT written in MindSpore that loads the converted checkpoint computes Megatron's
losses.

Not how bytes lie but what they are: a fused projection read in another order of heads, a gate taken
for a value would load without a word. megatron-core trains in fp32 and then computes a batch in the
same process."""

from __future__ import annotations

import numpy as np
import pytest

from parammap.cli.main import main
from tests.support import mindspore_gpt
from tests.support.meaning import CASES, ROUND_OFF


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
    assert np.abs(computed["wrong"] - expected).max() > 0.1, (
        "this would not see heads in the wrong order"
    )
