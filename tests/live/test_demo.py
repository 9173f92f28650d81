"""The demo proves what it says: it passes on the real thing, and fails on damage."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import paths

ROOT = paths.ROOT


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    done = run("examples.demo", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "proved: mindspore.load_checkpoint loaded 4 rank files; 606 tensors with 4,999,680 "
        "elements" in done.stdout
    )
    return out


def flip_a_bit(folder: Path) -> None:
    file = next((folder / "rank_4").glob("network.*"))
    file.chmod(0o644)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def swap_two_ranks(folder: Path) -> None:
    (folder / "rank_0").rename(folder / "spare")
    (folder / "rank_1").rename(folder / "rank_0")
    (folder / "spare").rename(folder / "rank_1")


def lose_a_rank(folder: Path) -> None:
    shutil.rmtree(folder / "rank_5")


def add_a_rank(folder: Path) -> None:
    shutil.copytree(folder / "rank_0", folder / "rank_2")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (flip_a_bit, "1 of "),
        (swap_two_ranks, "elements differ"),
        (lose_a_rank, "rank_5: 0 checkpoint files"),
        (add_a_rank, "rank_2: unexpected"),
    ],
)
def test_the_proof_fails_on_damage(demo, tmp_path, damage, told):
    shutil.copytree(demo / "mindspore", tmp_path / "mindspore")
    damage(tmp_path / "mindspore")
    proof = run("examples.mindspore_proof", demo / "megatron", tmp_path / "mindspore")
    assert proof.returncode == 1
    assert told in proof.stdout
    assert "NOT proved" in proof.stdout


def test_a_second_run_does_not_train_again(demo):
    model = next(demo.glob("megatron/iter_*/mp_rank_00_000/model_optim_rng.pt"))
    before = model.stat().st_mtime_ns
    done = run("examples.demo", demo, "--workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert model.stat().st_mtime_ns == before


def test_the_converters_refusal_is_the_demos(demo):
    assert run("examples.demo", demo, "--tp", "3").returncode == 2


def test_the_proof_holds_in_another_layout_and_fails_on_damage(demo, tmp_path):
    shutil.copytree(demo / "megatron", tmp_path / "megatron")
    layout = ("--tp", "8", "--pp", "4")
    done = run("examples.demo", tmp_path, *layout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "proved: mindspore.load_checkpoint loaded 32 rank files; 2,424 tensors with 5,188,608 "
        "elements" in done.stdout
    )
    swap_two_ranks(tmp_path / "mindspore")
    proof = run("examples.mindspore_proof", tmp_path / "megatron", tmp_path / "mindspore", *layout)
    assert proof.returncode == 1 and "elements differ" in proof.stdout
