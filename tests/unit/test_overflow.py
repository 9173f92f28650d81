"""Values that float16 cannot hold: what torch's own cast makes infinite is told, with its place,
and the run ends with 1."""

import json

import numpy as np
import pytest
import torch

from parammap.cli.main import main
from parammap.execute.checks import Overflown, cast, overflown
from parammap.execute.writer import Outcome
from parammap.job.journal import _entry, _outcome
from parammap.tensors.logical import MAIN_PARAM, LogicalTensor
from parammap.tensors.region import Cells
from tests.support.alpa import opt_weights, singleton

NAME, ATOM = "decoder.layers.1.fc1.weight", "layers.1.mlp.fc1.weight"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_elements_are_those_that_torch_makes_infinite(dtype):
    """Every bfloat16, and every float32 near the largest float16 and near infinity."""
    if dtype == "bfloat16":
        bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
        values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    else:
        near = np.concatenate(
            [np.arange(at - 9000, at + 9000, dtype=np.uint32) for at in (0x477FE000, 0x7F800000)]
        )
        bits = np.concatenate([near, near | np.uint32(1 << 31)])
        values = torch.from_numpy(bits.view(np.int32)).view(torch.float32)
    narrow, cols = values.half(), 32
    lost = torch.nonzero(values.isfinite() & narrow.isinf()).flatten().tolist()
    assert lost and np.array_equal(
        np.isinf(cast(bits, dtype, "float16").view(np.float16)), narrow.isinf().numpy()
    )
    tensor = LogicalTensor(MAIN_PARAM, "w", dtype, (len(bits) // cols + 8, cols + 3))
    found = overflown(tensor, Cells(7, 3, (1,)), bits.reshape(-1, cols), "file")
    assert found.count == len(lost)
    assert found.positions == [
        (7 + i // cols, 3 + i % cols, values[i].item(), "file") for i in lost[:4]
    ]


def test_a_killed_run_still_knows_of_it():
    outcome, tensor = Outcome("path", 3), LogicalTensor(MAIN_PARAM, "w", "float32", (3, 4))
    outcome.overflown[tensor] = Overflown(tensor, 2, [(1, 2, 65520.0, "file"), (2, 0, 1e9, "file")])
    assert _outcome(json.loads(json.dumps(_entry(outcome)))) == outcome


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_says_which_and_ends_with_1(dtype, tmp_path, capsys):
    weights = opt_weights(dtype)
    weights[NAME][3, 2], weights[NAME][5, 1], weights[NAME][6, 0] = 65536.0, -1e30, 65280.0
    source = singleton(tmp_path, weights)
    assert (
        main(["convert", str(source), str(tmp_path / "out"), "--to", "alpa", "--workers", "1"]) == 1
    )
    assert (
        f"{ATOM} (weight): 2 elements became infinite in float16, first at row 3, column 2 (65536) "
        f"in {source}" in capsys.readouterr().out
    )
    manifest = json.loads((tmp_path / "out/parammap_manifest.json").read_text())
    (told,) = manifest["overflown"]
    assert manifest["status"] == 1 and (told["tensor"], told["elements"]) == (ATOM, 2)
    assert [(at["row"], at["column"]) for at in told["first"]] == [(3, 2), (5, 1)]
    assert (
        main(
            [
                "convert",
                str(source),
                str(tmp_path / "wide"),
                "--to",
                "alpa",
                "--dtype",
                "float32",
                "--workers",
                "1",
            ]
        )
        == 0
    )
