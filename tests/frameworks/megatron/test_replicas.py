"""Copies that ranks keep of one tensor and that differ, in real checkpoints: what becomes of them
in another layout.

A layer norm is whole on every tensor-parallel rank; a tied head is a copy of the word embedding;
with expert parallel, each expert rank's model file has the dense weights. Here one rank's copy of
an element is changed, as bit rot or a defect of the training would; the files are read and written
by torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from parammap.checkpoint.manifest import MANIFEST
from parammap.cli.main import main
from tests.support.reshards import RUNS
from tests.support.torch_load import torch_load
from tests.support.way_back import rank_folders

NORM, NORM_ROW = "decoder.layers.1.input_layernorm.weight", 5
CANONICAL = "layers.1.input_norm.weight"
STATES = ("param", "exp_avg", "exp_avg_sq")
ROLES = {"param": "weight", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


class Rank(NamedTuple):
    """The files of one rank of a checkpoint with one chunk and one optimizer."""

    folder: Path

    @property
    def layout(self) -> dict:
        numbers = self.folder.name.split("_")[2:] + ["000"]
        file = self.folder.parent / "param_map" / f"layout_tp{numbers[0]}_pp{numbers[1]}.json"
        return json.loads(file.read_text())

    def state(self, state: str, name: str) -> tuple[torch.Tensor, dict]:
        """A view of a parameter's state in the content of distrib_optim.pt, and that content."""
        content = torch.load(self.folder / "distrib_optim.pt", weights_only=True)
        (buffer,) = self.layout["optimizers"][0]["buffers"]
        (slot,) = [param for param in buffer["params"] if param["name"] == name]
        buckets = buffer["buckets"]
        before = sum(bucket["numel_unpadded"] for bucket in buckets[: slot["bucket"]])
        start = slot["start"] - buckets[slot["bucket"]]["start"] + before
        (states,) = content[0].values()
        return states[state][start : start + slot["end"] - slot["start"]].view(
            slot["shape"]
        ), content

    def model(self, name: str) -> tuple[torch.Tensor, dict]:
        content = torch_load(self.folder / "model_optim_rng.pt")
        return content["model"][name], content

    def change(self, state: str, name: str, at: tuple[int, ...], value: float) -> None:
        """Of a weight, the model's copy too."""
        tensor, content = self.state(state, name)
        tensor[at] = value
        torch.save(content, self.folder / "distrib_optim.pt")
        if state == "param":
            self.change_model(name, at, value)

    def change_model(self, name: str, at: tuple[int, ...], value: float) -> None:
        tensor, content = self.model(name)
        tensor[at] = value
        torch.save(content, self.folder / "model_optim_rng.pt")


@pytest.fixture
def source(trained: Callable, tmp_path: Path) -> Callable[[str], dict[str, Rank]]:
    """source(name): the ranks of a copy of that run by folder name; its root is tmp_path/source."""
    return lambda name: {
        folder: Rank(path)
        for folder, path in rank_folders(
            Path(
                shutil.copytree(
                    trained(**RUNS[name]).path,
                    tmp_path / "source",
                    ignore=shutil.ignore_patterns("truth"),
                )
            )
        ).items()
    }


def convert(tmp_path: Path, *flags: str, name: str = "out") -> int:
    return main(
        ["convert", str(tmp_path / "source"), str(tmp_path / name), "--to", "megatron", *flags]
    )


def assert_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, said: list[str], *flags: str
) -> None:
    capsys.readouterr()
    assert convert(tmp_path, *flags) == 2
    (error,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("parammap:")
    ]
    assert all(word in error for word in [*said, "--replicas first or mean"]), error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def values(root: Path, state: str, name: str, at: tuple[int, ...]) -> list[float]:
    """What each rank of a checkpoint that holds the parameter holds there; nan as 'nan'."""
    ranks = [Rank(folder) for _, folder in sorted(rank_folders(root).items())]
    holders = [
        rank for rank in ranks if name in torch_load(rank.folder / "model_optim_rng.pt")["model"]
    ]
    found = [rank.state(state, name)[0][at].item() for rank in holders]
    return ["nan" if value != value else value for value in found]


def manifest(root: Path) -> dict:
    return json.loads((root / MANIFEST).read_text())


def told(value: float) -> str:
    return f"{value:.9g}"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("state", STATES)
def test_by_default_another_layout_is_refused(source, tmp_path, capsys, state, workers):
    ranks = source("tied")
    first = ranks["mp_rank_00_000"].state(state, NORM)[0][NORM_ROW].item()
    ranks["mp_rank_01_000"].change(state, NORM, (NORM_ROW,), first + 0.5)
    said = [
        f"{CANONICAL} ({ROLES[state]})",
        "1 elements",
        f"row {NORM_ROW}, column 0",
        told(first),
        told(torch.tensor(first + 0.5).item()),
        "mp_rank_01_000/distrib_optim.pt",
    ]
    assert_refused(tmp_path, capsys, said, "--tp", "4", "--pp", "1", "--workers", str(workers))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("choice", ["first", "mean"])
def test_the_first_rank_s_or_the_mean_by_the_user_s_word(source, tmp_path, capsys, state, choice):
    ranks = source("tied")
    first = ranks["mp_rank_00_000"].state(state, NORM)[0][NORM_ROW].item()
    ranks["mp_rank_01_000"].change(state, NORM, (NORM_ROW,), first + 0.5)
    assert convert(tmp_path, "--tp", "4", "--pp", "1", "--replicas", choice) == 0
    taken = {
        "first": first,
        "mean": torch.tensor((first + torch.tensor(first + 0.5).item()) / 2).item(),
    }[choice]
    assert values(tmp_path / "out", state, NORM, (NORM_ROW,)) == [taken] * 4
    assert (
        values(tmp_path / "out", state, NORM, (NORM_ROW + 1,))
        == [ranks["mp_rank_00_000"].state(state, NORM)[0][NORM_ROW + 1].item()] * 4
    )
    (entry,) = manifest(tmp_path / "out")["replicas_merged"]
    assert (entry["tensor"], entry["role"]) == (CANONICAL, ROLES[state])
    assert [(one["row"], one["column"]) for one in entry["first"]] == [(NORM_ROW, 0)] * len(
        entry["first"]
    )
    assert f"{CANONICAL} ({ROLES[state]})" in capsys.readouterr().out


def test_its_own_layout_keeps_each_rank_s_copy(source, tmp_path, capsys):
    ranks = source("tied")
    first = ranks["mp_rank_00_000"].state("exp_avg", NORM)[0][NORM_ROW].item()
    ranks["mp_rank_01_000"].change("exp_avg", NORM, (NORM_ROW,), 0.5)
    assert convert(tmp_path) == 1
    there = rank_folders(tmp_path / "out")
    own = [
        Rank(there[name]).state("exp_avg", NORM)[0][NORM_ROW].item()
        for name in ("mp_rank_00_000", "mp_rank_01_000")
    ]
    assert own == [first, 0.5]
    assert "each rank kept its own" in capsys.readouterr().out
    assert manifest(tmp_path / "out")["replicas_that_differ"] == [f"{CANONICAL} (exp_avg)"]


def test_the_tied_head_is_a_copy_of_the_embedding(source, tmp_path, capsys):
    """On the last stage; rank 1's row 3 is row 131 of the vocabulary."""
    ranks = source("tied")
    words, head = "embedding.word_embeddings.weight", "output_layer.weight"
    first = ranks["mp_rank_01_000"].state("exp_avg_sq", words)[0][3, 7].item()
    assert ranks["mp_rank_01_001"].state("exp_avg_sq", head)[0][3, 7].item() == first
    ranks["mp_rank_01_001"].change("exp_avg_sq", head, (3, 7), 2.0)
    assert_refused(
        tmp_path,
        capsys,
        [
            "embedding.word.weight (exp_avg_sq)",
            "row 131, column 7",
            told(first),
            "2 in",
            "mp_rank_01_001",
        ],
        "--pp",
        "4",
    )
    assert convert(tmp_path, "--pp", "4", "--replicas", "first") == 0
    assert values(tmp_path / "out", "exp_avg_sq", words, (3, 7))[1] == first
    assert values(tmp_path / "out", "exp_avg_sq", head, (3, 7))[1] == first


def test_no_number_is_another_value_than_a_number_and_equal_to_itself(source, tmp_path, capsys):
    ranks = source("tied")
    ranks["mp_rank_01_000"].change("exp_avg", NORM, (NORM_ROW,), float("nan"))
    assert_refused(tmp_path, capsys, [f"row {NORM_ROW}, column 0", "nan"], "--tp", "1", "--pp", "1")
    assert convert(tmp_path, "--tp", "1", "--pp", "1", "--replicas", "mean") == 0
    assert values(tmp_path / "out", "exp_avg", NORM, (NORM_ROW,)) == ["nan"]
    ranks["mp_rank_00_000"].change("exp_avg", NORM, (NORM_ROW,), float("nan"))
    assert convert(tmp_path, "--tp", "1", "--pp", "1", name="both") == 0
    assert values(tmp_path / "both", "exp_avg", NORM, (NORM_ROW,)) == ["nan"]


#: cut by columns over tp 2, and kept by both expert ranks: the model's bf16 copies, where the
#: optimizer has but one
COLS = "decoder.layers.2.self_attention.linear_proj.weight"


def test_bf16_weights_cut_by_columns(source, tmp_path, capsys):
    ranks = source("moe")
    changed, same = ranks["mp_rank_01_001"], ranks["mp_rank_01_000"]
    first = same.model(COLS)[0][9, 4].item()
    changed.change_model(COLS, (9, 4), 1.5)
    sizes = ("--weights-only", "--tp", "1", "--ep", "1")
    assert_refused(
        tmp_path,
        capsys,
        [
            "layers.2.attention.out.weight",
            "1 elements",
            f"row 9, column {32 + 4}",
            told(first),
            "1.5 in",
            "mp_rank_01_001",
        ],
        *sizes,
    )
    assert convert(tmp_path, *sizes, "--replicas", "mean") == 0
    (folder,) = rank_folders(tmp_path / "out").values()
    found = torch_load(folder / "model_optim_rng.pt")["model"][COLS]
    halves = [ranks[name].model(COLS)[0] for name in ("mp_rank_00_000", "mp_rank_01_000")]
    expected = torch.cat(halves, 1)
    expected[9, 32 + 4] = (first + 1.5) / 2
    assert found.dtype == torch.bfloat16 and torch.equal(
        found.view(torch.int16), expected.view(torch.int16)
    )
