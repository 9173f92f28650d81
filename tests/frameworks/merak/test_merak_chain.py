"""examples/merak_chain.sh: the command chains of Merak's guide on a model that it makes itself."""

import os
import subprocess
import sys

import torch

from tests.support import paths
from tests.support.merak import assert_same, digests, load, models

SCRIPT = paths.ROOT / "examples/merak_chain.sh"


def chain(out, cwd, **environment):
    return subprocess.run(
        ["bash", SCRIPT],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHON": sys.executable, "OUT": out, "WORKERS": "1", **environment},
    )


def test_the_chain_keeps_every_tensor(tmp_path, capsys):
    """From Megatron-DeepSpeed through three layouts to transformers, whose files are those that the
    same weights had at the start, and back to the files of the second step."""
    done = chain("out", tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    start, end = (
        load(out / "tiny/hf/pytorch_model.bin"),
        load(out / "merak_to_transformers/pytorch_model.bin"),
    )
    assert start.keys() == end.keys() and len(start) == 149
    assert all(torch.equal(tensor, end[name]) for name, tensor in start.items())
    assert_same(out / "transformers_to_merak", out / "merak_to_merak")
    assert (
        len(
            {
                str(digests(capsys, out / step))
                for step in (
                    "tiny/hf",
                    "tiny/deepspeed",
                    "ds_to_merak",
                    "merak_to_merak",
                    "merak_custom",
                    "transformers_to_merak",
                )
            }
        )
        == 1
    )
    stage = models(out / "merak_custom")["release/mp_rank_03_pp_rank_001/partial_model_optim.pt"]
    assert {name.split(".")[1] for name in stage} == {"3", "4", "5", "6"}


def test_a_chain_that_cannot_go_on_ends(tmp_path):
    done = chain("out", tmp_path, CUSTOM_PARTITION="0,3,7,11,14")
    assert done.returncode == 2 and "must begin with 0 and end with 15" in done.stderr
    assert not (tmp_path / "out/merak_to_transformers").exists()
    assert "set OUT" in chain("", tmp_path).stderr
