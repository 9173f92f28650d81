"""What the tests of test_merak share with others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from parammap.cli.main import main
from tests.support import paths

DATA = paths.TESTS / "data/merak"

HF = DATA / "hf"

CONFIG = HF / "config.json"

SAID = json.loads(CONFIG.read_text())

TRACKER = "latest_checkpointed_iteration.txt"

WHOLE = ("--tp", "1", "--pp", "1")


def convert(source, out, *flags, to="merak", status=0):
    assert main(["convert", str(source), str(out), "--to", to, "--workers", "1", *flags]) == status
    return out


def refused(capsys, *arguments):
    """The message of a conversion that is refused, with nothing written."""
    capsys.readouterr()
    assert main(["convert", *map(str, arguments), "--to", "merak", "--workers", "1"]) == 2
    assert not Path(arguments[1]).exists()
    return capsys.readouterr().err


def load(path):
    return torch.load(path, weights_only=False)


def models(folder):
    """The `model` of each file, by path."""
    return {
        str(path.relative_to(folder)): load(path)["model"] for path in sorted(folder.rglob("*.pt"))
    }


def assert_same(folder, golden):
    """Tensor for tensor: files, names and their order, shapes, dtypes, values."""
    mine, theirs = models(folder), models(golden)
    assert mine.keys() == theirs.keys() and mine
    for file, tensors in theirs.items():
        assert list(mine[file]) == list(tensors), file
        for name, tensor in tensors.items():
            own = mine[file][name]
            assert (own.shape, own.dtype) == (tensor.shape, tensor.dtype) and torch.equal(
                own, tensor
            ), (file, name)
            assert own.is_contiguous()


def module(name, layers):
    """Merak's name of transformers' tensor."""
    number = {"wte": 0, "wpe": 1}.get(name.split(".")[1], layers + 2)
    return f"module.{int(name.split('.')[2]) + 2 if '.h.' in name else number}.{name}"


def as_run(
    root,
    weights,
    *,
    config=None,
    tracker="release",
    name="iter_0000000_all_dp",
    legacy=True,
    **content,
):
    """transformers' weights as Merak's runtime keeps them at tp 1 · pp 1: the same tensors, by its
    names."""
    layers = 1 + max(int(name.split(".")[2]) for name in weights if ".h." in name)
    (root / name).mkdir(parents=True)
    model = {module(name, layers): tensor for name, tensor in weights.items()}
    torch.save(
        {"model": model, "checkpoint_version": 3.0, **content},
        root / name / "model_optim.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    (root / TRACKER).write_text(tracker)
    if config:
        (root / name / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="module")
def weights():
    return load(HF / "pytorch_model.bin")


def digests(capsys, source, *flags):
    capsys.readouterr()
    assert main(["digest", str(source), "--json", "--workers", "1", *flags]) == 0
    return {
        (one["role"], one["name"]): one["digest"]
        for one in json.loads(capsys.readouterr().out)["digests"]
        if not one["name"].endswith(".padding")
    }
