"""inspect_checkpoint.py: what it says of files of every format, against torch, numpy and
safetensors themselves."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from convert.inspect_checkpoint import main
from tests.support import paths

ROOT = paths.ROOT
DATA = ROOT / "tests/data"
_TENSOR = re.compile(r"  (\S+) (\[.*\]) (\w+) sum (\S+?)(?:, (\d+) not finite)?")


def said(text: str) -> dict[str, tuple]:
    """By name: shape, dtype, sum and how many are not finite."""
    found = [match.groups() for line in text.splitlines() if (match := _TENSOR.fullmatch(line))]
    return {
        name: (shape, dtype, float(total), int(odd or 0))
        for name, shape, dtype, total, odd in found
    }


def expected(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    result = {}
    for name, value in tensors.items():
        wide = value.double()
        finite = wide[wide.isfinite()]
        result[name] = (
            str(list(value.shape)),
            str(value.dtype).removeprefix("torch."),
            pytest.approx(finite.sum().item(), rel=1e-8, abs=1e-12),
            value.numel() - finite.numel(),
        )
    return result


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """One of every dtype that floats, integers, an empty one, a scalar, and one larger than the
    reader's buffer."""
    torch.manual_seed(2)
    made = {
        str(dtype).removeprefix("torch."): (torch.randn(5, 7) * 9).to(dtype)
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int8,
        )
    }
    made["odd"] = torch.tensor([1.5, float("nan"), float("inf"), -float("inf")])
    return {
        **made,
        "bool": torch.tensor([True, True, False]),
        "scalar": torch.tensor(3.25),
        "none": torch.zeros(0, 3),
        "large": torch.randn(300, 1000),
    }


def test_files_by_name(tensors, tmp_path, capsys):
    torch.save(tensors, tmp_path / "zip.pt")
    torch.save(tensors, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "st.safetensors")
    for path in sorted(tmp_path.iterdir()):
        assert main([str(path)]) == 0
        text = capsys.readouterr().out
        assert said(text) == expected(tensors)
        assert text.startswith(f"{path}: {path.stat().st_size:,} bytes, {len(tensors)} tensors\n")


def test_an_array_without_an_ending(tmp_path, capsys):
    with open(tmp_path / "decoder.weight", "wb") as stream:
        np.save(stream, np.arange(6, dtype=np.float32).reshape(2, 3))
    assert main([str(tmp_path / "decoder.weight")]) == 0
    assert said(capsys.readouterr().out) == {"decoder.weight": ("[2, 3]", "float32", 15.0, 0)}


def test_a_nested_file_is_named_as_python_subscripts_it(tmp_path, capsys):
    torch.save(
        {"model": {"w": torch.ones(2)}, "iteration": 3, "states": [torch.ones(1)]},
        tmp_path / "one.pt",
    )
    assert main([str(tmp_path / "one.pt")]) == 0
    assert said(capsys.readouterr().out).keys() == {"['model']['w']", "['states'][0]"}


def test_a_folder_says_its_layout_and_every_file(capsys):
    folder = DATA / "transformers/llama_tp2pp2"
    assert main([str(folder)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == (
        f"{folder}/iter_0000001: megatron, iteration 1, tp2 pp2 vpp1 ep1 etp2 cp1 dp1, 4 layers"
    )
    found = said("\n".join(rest))
    path = folder / "iter_0000001/mp_rank_01_001/model_optim_rng.pt"
    model = torch.load(path, weights_only=False)["model"]
    last = expected(
        {
            f"['model']['{name}']": value
            for name, value in model.items()
            if isinstance(value, torch.Tensor)
        }
    )
    assert {name: found[name] for name in last} == last
    assert [line for line in rest if line.startswith("/")] == [
        f"{file}: {file.stat().st_size:,} bytes, {count} tensors"
        for file, count in zip(sorted(folder.glob("iter_*/*/*.pt")), (13, 14, 13, 14), strict=True)
    ]


def test_a_transformers_folder_as_a_script():
    folder = DATA / "transformers/llama_hf"
    run = subprocess.run(
        [sys.executable, ROOT / "convert/inspect_checkpoint.py", folder],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(
        f"{folder}: transformers, iteration 0, tp1 pp1 vpp1 ep1 etp1 cp1 dp1, 4 layers\n"
    )
    whole = expected(torch.load(folder / "pytorch_model.bin"))
    found = said(run.stdout)
    assert {
        name: found[name] for name in whole
    } == whole and f"{folder}/config.json: 642 bytes, 0 tensors" in run.stdout


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("notes.txt", b"text", "is no"),
        ("cut.safetensors", b"\x10\0\0\0\0\0\0\0{", "not a safetensors file"),
        ("cut.pt", b"PK\x03\x04", "cut.pt"),
        (None, None, "no such file or folder"),
    ],
)
def test_what_cannot_be_read_is_one_line(name, content, reason, tmp_path, capsys):
    path = tmp_path / (name or "missing")
    if content is not None:
        path.write_bytes(content)
    assert main([str(path)]) == 2
    captured = capsys.readouterr()
    assert reason in captured.err and len(captured.err.splitlines()) == 1 and not captured.out


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
