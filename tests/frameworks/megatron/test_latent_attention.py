"""Multi-latent attention in another layout: what every rank holds whole stays whole, and what
ParamMap 0.1.0 made of it is recognised.

The checkpoints are of Megatron-LM's own pretrain_gpt.py, with the names and attributes of
Transformer Engine's layers."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from parammap.cli.main import main
from tests.support import paths
from tests.support.torch_load import torch_load
from tests.support.way_back import assert_equal, rank_folders

DATA = paths.TESTS / "data" / "megatron" / "te_mla.tar.xz"
#: up to core 0.16 Megatron marks the copies as parts, from 0.17 on as what they are
BEFORE_MARKS, MARKED = "core_v0.16.0_te_mla_tp2", "core_v0.17.0_te_mla_tp1"
#: what ParamMap 0.1.0 made of BEFORE_MARKS with --tp 1, and the layout file of a run of that
#: release at tp 1
JOINED, LIVE_AT_TP1 = "parammap_0.1.0_mla_tp1", "core_v0.16.0_te_mla_tp1_layout.json"
DOWN = {"linear_q_down_proj.weight": [8, 16], "linear_kv_down_proj.weight": [16, 16]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("te_mla")
    with tarfile.open(DATA) as archive:
        archive.extractall(folder, filter="data")
    return folder


def converted(source: Path, target: Path, *flags: str, to: str = "megatron") -> Path:
    assert main(["convert", str(source), str(target), "--to", to, "--workers", "1", *flags]) == 0
    return target


def models(root: Path) -> list[dict]:
    return [
        torch_load(folder / "model_optim_rng.pt")["model"]
        for _, folder in sorted(rank_folders(root).items())
    ]


def whole(model: dict) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in sorted(model.items()) if name.endswith(tuple(DOWN))}


def first_layout(root: Path) -> dict:
    return json.loads(next(root.glob("iter_*/param_map/layout_tp00*.json")).read_text())


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", [BEFORE_MARKS, MARKED])
def test_every_rank_keeps_the_down_projections_whole(data, name, tp, tmp_path):
    source = data / name
    expected = whole(models(source)[0])
    assert len(expected) == 2
    out = models(converted(source, tmp_path / "out", "--tp", str(tp)))
    assert len(out) == tp
    for model in out:
        assert_equal(whole(model), expected)
        assert all(
            list(tensor.shape) == DOWN[name.split("self_attention.")[1]]
            for name, tensor in whole(model).items()
        )
    assert main(["diff", str(source), str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_the_optimizer_comes_back(data, tmp_path):
    there = converted(data / BEFORE_MARKS, tmp_path / "there", "--tp", "4")
    back = rank_folders(converted(there, tmp_path / "back", "--tp", "2"))
    for name, folder in rank_folders(data / BEFORE_MARKS).items():
        for file in ("distrib_optim.pt", "model_optim_rng.pt"):
            ours, theirs = torch_load(back[name] / file), torch_load(folder / file)
            assert_equal(*(one.get("model", one) for one in (ours, theirs)))


def test_buckets_lie_as_the_release_lays_them_out(data, tmp_path):
    """Against the layout file of a run at tp 1 by the same release."""
    live = json.loads((data / LIVE_AT_TP1).read_text())
    out = first_layout(converted(data / BEFORE_MARKS, tmp_path / "out", "--tp", "1"))
    ours, theirs = (
        [(p["name"], p["shape"], p["start"], p["end"], p["bucket"]) for p in params_of(one)]
        for one in (out, live)
    )
    assert ours == theirs


@pytest.mark.parametrize("to", ["megatron-dist", "mindspore"])
def test_through_another_form(data, to, tmp_path):
    flags = ["--names", "megatron"] if to == "mindspore" else []
    between = converted(data / BEFORE_MARKS, tmp_path / "between", *flags, to=to)
    out = converted(between, tmp_path / "out", "--tp", "4")
    for model in models(out):
        assert_equal(whole(model), whole(models(data / BEFORE_MARKS)[0]))
    assert (
        main(["diff", str(data / BEFORE_MARKS), str(between)])
        == main(["diff", str(between), str(out)])
        == 0
    )


def test_without_a_sidecar_one_rank_does_not_tell(data, tmp_path, capsys):
    arguments = [
        str(data / MARKED),
        str(tmp_path / "out"),
        "--to",
        "megatron",
        "--weights-only",
        "--tp",
        "2",
    ]
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert "linear_q_down_proj.weight [8, 16]: nobody recorded whether" in error, error
    converted(data / BEFORE_MARKS, tmp_path / "weights", "--weights-only", "--tp", "1")
    assert_equal(whole(models(tmp_path / "weights")[0]), whole(models(data / BEFORE_MARKS)[0]))


def test_what_0_1_0_joined_is_recognised(data, tmp_path, capsys):
    wrong = [
        "layers.0.attention.q_down.weight: [16, 16] as a whole, and [8, 16] by the arguments",
        "layers.0.attention.kv_down.weight: [32, 16] as a whole, and [16, 16] by the arguments",
    ]
    for command in (
        ["verify", str(data / JOINED)],
        ["diff", str(data / BEFORE_MARKS), str(data / JOINED)],
    ):
        assert main(command) == 1
        out = capsys.readouterr().out
        assert all(line in out for line in wrong), out
    assert (
        main(
            ["convert", str(data / JOINED), str(tmp_path / "out"), "--to", "megatron", "--tp", "2"]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert (
        "by the arguments" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    )


def with_facts(source: Path, folder: Path, name: str, **facts: object) -> Path:
    """The checkpoint with a tensor renamed to as long a name, so that no family knows it, and other
    facts of it."""
    shutil.copytree(source, folder)
    for file in folder.rglob("model_optim_rng.pt"):
        with zipfile.ZipFile(file) as archive:
            records = {
                record: archive.read(record).replace(name.encode(), strange(name))
                for record in archive.namelist()
            }
        with zipfile.ZipFile(file, "w") as archive:
            for record, content in records.items():
                archive.writestr(record, content)
    for file in folder.rglob("*.json"):
        text = json.loads(file.read_bytes().replace(name.encode(), strange(name)))
        for param in params_of(text):
            if "strange" in param["name"]:
                param.update(facts)
        file.write_text(json.dumps(text))
    return folder


def strange(name: str) -> bytes:
    return b"strange".ljust(len(name), b"_")


def params_of(layout: dict) -> list[dict]:
    return [
        param
        for optimizer in layout.get("optimizers", ())
        for buffer in optimizer["buffers"]
        for param in buffer["params"]
    ]


def test_a_strange_tensor_marked_as_copies_stays_whole(data, tmp_path):
    """As core 0.17 marks what Transformer Engine duplicates: a dimension, and not tensor
    parallel."""
    source = with_facts(
        data / BEFORE_MARKS,
        tmp_path / "source",
        "linear_q_down_proj",
        partition_dim=0,
        tensor_parallel=False,
    )
    name = f"decoder.layers.0.self_attention.{strange('linear_q_down_proj').decode()}.weight"
    expected = models(source)[0][name]
    for model in models(converted(source, tmp_path / "out", "--tp", "4")):
        assert_equal(model[name], expected)


@pytest.mark.parametrize(
    "facts",
    [{"partition_dim": -1, "tensor_parallel": True}, {"partition_stride": 2}],
    ids=["contradictory", "strided"],
)
@pytest.mark.parametrize("name", [BEFORE_MARKS, MARKED])
def test_a_strange_tensor_whose_cut_the_facts_do_not_tell_is_refused(
    data, name, facts, tmp_path, capsys
):
    source = with_facts(data / name, tmp_path / "source", "linear_q_up_proj", **facts)
    assert (
        main(["convert", str(source), str(tmp_path / "out"), "--to", "megatron", "--tp", "4"]) == 2
    )
    error = capsys.readouterr().err
    assert "nobody recorded how" in error and "strange" in error and not (tmp_path / "out").exists()
    converted(source, tmp_path / "same")
    assert_equal(models(tmp_path / "same"), models(source))


def test_a_family_s_tensor_that_the_sidecar_contradicts_is_refused(data, tmp_path, capsys):
    source = shutil.copytree(data / BEFORE_MARKS, tmp_path / "source")
    for file in source.rglob("layout_*.json"):
        text = json.loads(file.read_text())
        for param in params_of(text):
            if param["name"].endswith("linear_proj.weight"):
                param["partition_dim"] = 0
        file.write_text(json.dumps(text))
    assert (
        main(
            [
                "convert",
                str(source),
                str(tmp_path / "out"),
                "--to",
                "megatron",
                "--weights-only",
                "--tp",
                "4",
            ]
        )
        == 0
    )
    assert (
        main(["convert", str(source), str(tmp_path / "out2"), "--to", "megatron", "--tp", "4"]) == 2
    )
    assert "contradict each other" in capsys.readouterr().err
