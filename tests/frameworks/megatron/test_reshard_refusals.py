"""What cannot be laid out anew is refused: status 2, one line with names and numbers, nothing
written.

And what little is enough: partition facts of the sidecar for tensors of no known family, and no
sidecar at all for weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parammap.cli.main import main
from tests.support.reshards import RUNS, SMALL
from tests.support.torch_load import torch_load
from tests.support.way_back import assert_equal, rank_folders

OTHERS = {
    "shared": {
        "core": "0.16.1",
        **SMALL,
        "layers": 1,
        "no_bias": True,
        "experts": 2,
        "swiglu": True,
        "shared_expert": 12,
    },
    "no_args": {
        "core": "0.6.0",
        **SMALL,
        "layers": 2,
        "hidden": 48,
        "heads": 6,
        "pp": 2,
        "no_args": True,
    },
}

REFUSED = {
    "heads": ("tied", "--tp 16", ["linear_qkv", "8 attention heads", "tp 16"]),
    "query groups": ("llama", "--tp 8", ["linear_qkv", "4 query groups", "tp 8"]),
    "ffn": (
        "shared",
        "--tp 8",
        ["shared_experts.linear_fc1.weight", "12 rows each of gate and up", "tp 8"],
    ),
    "vocabulary": ("no_args", "--tp 3", ["embedding.word_embeddings.weight", "256 rows", "tp 3"]),
    "experts": ("moe", "--ep 3 --dp 3", ["4 experts", "ep 3"]),
    "dp and ep": ("moe", "--ep 4 --dp 6", ["dp 6", "ep 4", "--dp"]),
    "layers": ("tied", "--pp 3", ["4 layers", "pp 3", "--stage-layers"]),
    "chunks": ("tied", "--pp 2 --vpp 3", ["4 layers", "pp 2", "vpp 3"]),
    "chunks of one stage": ("tied", "--pp 1 --vpp 2", ["pp 1", "vpp 2"]),
    "too few stages": ("tied", "--pp 3 --stage-layers 2,2", ["2 numbers", "pp 3"]),
    "wrong sum": ("tied", "--pp 3 --stage-layers 2,2,1", ["2,2,1", "add up to 5", "4 layers"]),
    "uneven chunks": ("tied", "--pp 2 --vpp 2 --stage-layers 3,1", ["3 layers", "vpp 2"]),
    "less than none": ("tied", "--pp 2 --stage-layers=-1,5", ["-1,5", "-1 is no number"]),
    "etp": ("moe", "--tp 4 --etp 2", ["expert tensor parallel 2", "tp 4"]),
}


@pytest.fixture
def source(trained: Callable, tmp_path: Path) -> Callable[[str], Path]:
    """source(name): a copy of that run."""
    runs = RUNS | OTHERS
    return lambda name: Path(
        shutil.copytree(
            trained(**runs[name]).path, tmp_path / "source", ignore=shutil.ignore_patterns("truth")
        )
    )


def assert_refused(
    capsys: pytest.CaptureFixture, source: Path, flags: str, said: list[str]
) -> None:
    before = sorted(source.parent.iterdir())
    capsys.readouterr()
    assert (
        main(
            ["convert", str(source), str(source.parent / "out"), "--to", "megatron", *flags.split()]
        )
        == 2
    )
    out, error = capsys.readouterr()
    assert not out and error.startswith("parammap: ") and error.count("\n") == 1
    assert all(word in error for word in said), error
    assert sorted(source.parent.iterdir()) == before


def converted(source: Path, name: str, flags: str) -> Path:
    target = source.parent / name
    assert (
        main(
            [
                "convert",
                str(source),
                str(target),
                "--to",
                "megatron",
                "--workers",
                "1",
                *flags.split(),
            ]
        )
        == 0
    )
    return target


@pytest.mark.parametrize("case", REFUSED)
def test_sizes_that_do_not_divide(source, capsys, case):
    name, flags, said = REFUSED[case]
    assert_refused(capsys, source(name), flags, said)


def test_layers_that_are_no_numbers(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(
            [
                "convert",
                str(tmp_path),
                str(tmp_path / "out"),
                "--to",
                "megatron",
                "--stage-layers",
                "2,x",
            ]
        )
    assert "--stage-layers: '2,x' is no list of numbers" in capsys.readouterr().err


def test_a_tie_that_nobody_recorded(source, capsys):
    """Maps as the existing tool's patch writes them, and no arguments: tied or not, a stage's head
    has the same name."""
    bare = source("no_args")
    for file in bare.rglob("layout_*.json"):
        file.unlink()
    assert_refused(
        capsys,
        bare,
        "--pp 1",
        ["whether the output layer is the word embedding", "pp 2", "keep pp"],
    )
    converted(bare, "same_pp", "--tp 2")


def renamed(source: Path, names: dict[str, str], with_facts: bool) -> Path:
    """The checkpoint with parts of its tensors' names replaced, so that no family knows them."""
    for file in source.rglob("model_optim_rng.pt"):
        content = torch_load(file)
        content["model"] = {_replaced(key, names): value for key, value in content["model"].items()}
        torch.save(content, file)
    for file in source.rglob("*.json"):
        layout = json.loads(_replaced(file.read_text(), names))
        for optimizer in layout.get("optimizers", []) if not with_facts else []:
            for param in (param for buffer in optimizer["buffers"] for param in buffer["params"]):
                if any(name in param["name"] for name in names.values()):
                    del param["partition_dim"]
        file.write_text(json.dumps(layout))
    return source


def _replaced(text: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        text = text.replace(old, new)
    return text


#: a tensor cut by columns, one by rows, and one that is whole on every rank
STRANGE = {
    "self_attention.linear_proj.weight": "self_attention.strange.weight",
    "mlp.linear_fc1.bias": "mlp.strange.bias",
    "input_layernorm.bias": "strange_norm.bias",
}


def test_partition_facts_are_enough_for_tensors_of_no_known_family(source):
    known = source("tied")
    expected = converted(known, "expected", "--tp 4 --pp 1 --dp 3")
    found = converted(renamed(known, STRANGE, with_facts=True), "found", "--tp 4 --pp 1 --dp 3")
    assert set(rank_folders(found)) == set(rank_folders(expected)) and len(rank_folders(found)) == 4
    for name, folder in rank_folders(expected).items():
        own, theirs = (
            torch_load(root / "model_optim_rng.pt")["model"]
            for root in (rank_folders(found)[name], folder)
        )
        assert_equal(own, {_replaced(key, STRANGE): value for key, value in theirs.items()})
        own, theirs = (
            torch.load(root / "distrib_optim.pt", weights_only=True)
            for root in (rank_folders(found)[name], folder)
        )
        assert_equal(own, theirs)


def test_what_nobody_knows_how_it_is_cut_is_converted_in_its_own_layout_only(source, capsys):
    strange = renamed(source("tied"), STRANGE, with_facts=False)
    assert_refused(capsys, strange, "--tp 4", ["nobody recorded how 12 tensors are cut", "strange"])
    same = converted(strange, "same", "")
    for name, folder in rank_folders(strange).items():
        models = [
            torch_load(root / "model_optim_rng.pt")["model"]
            for root in (rank_folders(same)[name], folder)
        ]
        assert_equal(*models)


def test_weights_alone_need_no_sidecar(source):
    whole = source("tied")
    expected = converted(whole, "expected", "--tp 4 --pp 1")
    for folder in [*whole.rglob("param_map"), *whole.rglob("distrib_optim.pt")]:
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    found = converted(whole, "found", "--tp 4 --pp 1 --weights-only")
    for name, folder in rank_folders(expected).items():
        models = [
            torch_load(root / "model_optim_rng.pt")["model"]
            for root in (rank_folders(found)[name], folder)
        ]
        assert_equal(*models)
