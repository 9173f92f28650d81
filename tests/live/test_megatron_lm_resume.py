"""With MEGATRON_LM=<git checkout>: Megatron-LM's own pretrain_gpt.py goes on from a checkpoint that
came back.

The script trains, is stopped, its checkpoint goes to MindSpore files and back, and the script goes
on with --load. The losses in its log, and weights and moments in the live process at the end, are
those of an uninterrupted run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.tiny.trained import Trained
from tests.support import mlm_entry
from tests.support.megatron_lm import (
    CHECKOUT,
    MOCK_VOCAB,
    TP2_PP2,
    needs_checkout,
    needs_its_packages,
)
from tests.support.mindspore_resave import resave

BEFORE, ALL = 2, 5
#: iterations after the stop whose losses are compared; the second line of a core 0.16 log has the
#: mean of the first two
COMPARED = (3, 5)

PP2 = "--pipeline-model-parallel-size 2 --overlap-grad-reduce"
#: case -> release, processes, flags, elements per bucket. No dropout: the generators of CPU and GPU
#: are one here, and from it the script draws a seed for each new data loader
CASES = {
    "cac60ce4_legacy_tp2pp2": ("cac60ce4", 4, TP2_PP2, 20_000),
    "cac60ce4_legacy_pp2dp2": ("cac60ce4", 4, PP2, 20_000),
    "core_r0.12.0_tp2pp2": ("core_r0.12.0", 4, f"{TP2_PP2} --hidden-size 128 {MOCK_VOCAB}", 20_000),
    "core_r0.16.0_pp2dp2": ("core_r0.16.0", 4, f"{PP2} --hidden-size 128 {MOCK_VOCAB}", 20_000),
}


def train(case: str, folder: Path, until: int, *flags: Any) -> Trained:
    """Train until that iteration and save there; every run is told the same --train-iters, which
    makes its data."""
    release, processes, words, bucket = CASES[case]
    folder.mkdir()
    return mlm_entry.train(
        CHECKOUT,
        release,
        folder,
        processes,
        [
            *words.split(),
            "--train-iters",
            str(ALL),
            "--exit-interval",
            str(until),
            "--save-interval",
            str(until),
            *map(str, flags),
        ],
        bucket,
    )


def there_and_back(checkpoint: Path, scratch: Path) -> Path:
    """The checkpoint after MindSpore files, which MindSpore loaded and saved, and back."""
    parammap("convert", checkpoint, scratch / "mindspore", "--to", "mindspore")
    resave((scratch / "mindspore").glob("rank_*/*.ckpt"))
    parammap("convert", scratch / "mindspore", scratch / "back", "--to", "megatron")
    return scratch / "back"


def parammap(*arguments: Any) -> None:
    command = [sys.executable, "-m", "parammap", *map(str, arguments)]
    done = subprocess.run(command, cwd=mlm_entry.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(run: Trained) -> dict[int, str]:
    """iteration: what the script printed of it, from the learning rate to the gradient norm."""
    log = "".join(file.read_text() for file in sorted((run.path.parent / "logs").glob("rank*.log")))
    lines = re.findall(r"iteration +(\d+)/.*?\| (learning rate:.*? grad norm: [^|]*)\|", log)
    return {int(number): line for number, line in lines}


def bits(run: Trained) -> dict[tuple, np.ndarray]:
    arrays = {
        (truth.place, chunk, name, role): truth.array(chunk, name, role)
        for truth in run.truths()
        for chunk, name in truth.names()
        for role in ("weight", "main", "exp_avg", "exp_avg_sq")
    }
    return {key: array.view(f"u{array.itemsize}") for key, array in arrays.items()}


@needs_checkout
@needs_its_packages
@pytest.mark.parametrize("case", CASES)
def test_the_real_script_goes_on_as_if_it_had_never_been_stopped(case, tmp_path):
    whole = train(case, tmp_path / "whole", ALL)
    stopped = train(case, tmp_path / "stopped", BEFORE)
    back = there_and_back(stopped.path, tmp_path)
    gone_on = train(case, tmp_path / "gone_on", ALL, "--load", back)
    assert sorted(losses(gone_on)) == list(range(BEFORE + 1, ALL + 1))
    expected = losses(whole)
    assert {number: losses(gone_on)[number] for number in COMPARED} == {
        number: expected[number] for number in COMPARED
    }
    mine, theirs = bits(gone_on), bits(whole)
    assert set(mine) == set(theirs) and len(mine) > 100
    assert [key for key in mine if not np.array_equal(mine[key], theirs[key])] == []
    for truth, other in zip(gone_on.truths(), whole.truths(), strict=True):
        assert truth.meta["scheduler"] == other.meta["scheduler"]
        assert truth.meta["param_groups"] == other.meta["param_groups"]
