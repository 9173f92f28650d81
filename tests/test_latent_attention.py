"""Multi-latent attention in another layout: what every rank holds whole stays whole, and what ParamMap 0.1.0 made of it is
recognised.

The checkpoints are of Megatron-LM's own pretrain_gpt.py, with the names and attributes of Transformer Engine's layers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from convert.cli import main
from tests.lab.torch_load import torch_load
from tests.test_way_back import assert_equal, rank_folders

DATA = Path(__file__).parent / "data" / "megatron"
#: up to core 0.16 Megatron marks the copies as parts, from 0.17 on as what they are
BEFORE_MARKS, MARKED = DATA / "core_v0.16.0_te_mla_tp2", DATA / "core_v0.17.0_te_mla_tp1"
#: what ParamMap 0.1.0 made of BEFORE_MARKS with --tp 1
JOINED = DATA / "parammap_0.1.0_mla_tp1"
DOWN = {"linear_q_down_proj.weight": [8, 16], "linear_kv_down_proj.weight": [16, 16]}


def converted(source: Path, target: Path, *flags: str, to: str = "megatron") -> Path:
    assert main(["convert", str(source), str(target), "--to", to, "--workers", "1", *flags]) == 0
    return target


def models(root: Path) -> list[dict]:
    return [torch_load(folder / "model_optim_rng.pt")["model"] for _, folder in sorted(rank_folders(root).items())]


def whole(model: dict) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.items() if name.endswith(tuple(DOWN))}


def first_layout(root: Path) -> dict:
    return json.loads(next(root.glob("iter_*/param_map/layout_tp00*.json")).read_text())


def positions(root: Path) -> list[tuple]:
    """Where rank 0's parameters lie in its buffers, by its layout file."""
    buffers = (buffer for optimizer in first_layout(root)["optimizers"] for buffer in optimizer["buffers"])
    return [(param["name"], param["shape"], param["start"], param["bucket"]) for buffer in buffers
            for param in buffer["params"]]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("source", [BEFORE_MARKS, MARKED], ids=["0.16", "0.17"])
def test_every_rank_keeps_the_down_projections_whole(source, tp, tmp_path):
    expected = whole(models(source)[0])
    assert len(expected) == 2
    out = models(converted(source, tmp_path / "out", "--tp", str(tp)))
    assert len(out) == tp
    for model in out:
        assert_equal(whole(model), expected)
        assert all(list(tensor.shape) == DOWN[name.split("self_attention.")[1]] for name, tensor in whole(model).items())
    assert main(["diff", str(source), str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_the_optimizer_comes_back(tmp_path):
    there = converted(BEFORE_MARKS, tmp_path / "there", "--tp", "4")
    back = rank_folders(converted(there, tmp_path / "back", "--tp", "2"))
    for name, folder in rank_folders(BEFORE_MARKS).items():
        for file in ("distrib_optim.pt", "model_optim_rng.pt"):
            ours, theirs = torch_load(back[name] / file), torch_load(folder / file)
            assert_equal(*(one.get("model", one) for one in (ours, theirs)))


def test_buckets_lie_as_the_release_lays_them_out(tmp_path):
    """Against the layout file of a run at tp 1 by the same release."""
    live = json.loads((DATA / "core_v0.16.0_te_mla_tp1_layout.json").read_text())
    out = first_layout(converted(BEFORE_MARKS, tmp_path / "out", "--tp", "1"))
    ours, theirs = ([[(p["name"], p["shape"], p["start"], p["end"], p["bucket"]) for p in buffer["params"]]
                     for optimizer in one["optimizers"] for buffer in optimizer["buffers"]] for one in (out, live))
    assert ours == theirs


@pytest.mark.parametrize("to", ["megatron-dist", "mindspore"])
def test_through_another_form(to, tmp_path):
    flags = ["--names", "megatron"] if to == "mindspore" else []
    between = converted(BEFORE_MARKS, tmp_path / "between", *flags, to=to)
    straight, around = (rank_folders(converted(one, tmp_path / name, "--tp", "4"))
                        for one, name in ((BEFORE_MARKS, "straight"), (between, "around")))
    for name, folder in straight.items():
        for file in ("distrib_optim.pt", "model_optim_rng.pt"):
            ours, theirs = torch_load(around[name] / file), torch_load(folder / file)
            assert_equal(*({key: (one.get("model") or one)[key] for key in sorted(one.get("model") or one, key=str)}
                           for one in (ours, theirs)))


def test_without_a_sidecar_one_rank_does_not_tell(tmp_path, capsys):
    assert main(["convert", str(MARKED), str(tmp_path / "out"), "--to", "megatron", "--weights-only", "--tp", "2"]) == 2
    assert "linear_kv_down_proj.weight [16, 16]: nobody recorded whether" in capsys.readouterr().err
    converted(BEFORE_MARKS, tmp_path / "weights", "--weights-only", "--tp", "1")
    assert_equal(whole(models(tmp_path / "weights")[0]), whole(models(BEFORE_MARKS)[0]))


def test_what_0_1_0_joined_is_recognised(tmp_path, capsys):
    wrong = ["layers.0.attention.q_down.weight: [16, 16] as a whole, and [8, 16] by the arguments",
             "layers.0.attention.kv_down.weight: [32, 16] as a whole, and [16, 16] by the arguments"]
    for command in (["verify", str(JOINED)], ["diff", str(BEFORE_MARKS), str(JOINED)]):
        assert main(command) == 1
        out = capsys.readouterr().out
        assert all(line in out for line in wrong), out
    assert main(["convert", str(JOINED), str(tmp_path / "out"), "--to", "megatron", "--tp", "2"]) == 2
    error = capsys.readouterr().err
    assert "by the arguments" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def with_facts(source: Path, folder: Path, name: str, **facts: object) -> Path:
    """The checkpoint with a tensor renamed, so that no family knows it, and other facts of it."""
    shutil.copytree(source, folder)
    for file in folder.rglob("model_optim_rng.pt"):
        content = torch_load(file)
        content["model"] = {key.replace(name, "strange"): value for key, value in content["model"].items()}
        torch.save(content, file)
    for file in folder.rglob("*.json"):
        text = json.loads(file.read_text().replace(name, "strange"))
        for param in (param for optimizer in text.get("optimizers", ()) for buffer in optimizer["buffers"]
                      for param in buffer["params"]):
            if "strange" in param["name"]:
                param.update(facts)
        file.write_text(json.dumps(text))
    return folder


def test_a_strange_tensor_marked_as_copies_stays_whole(tmp_path):
    """As core 0.17 marks what Transformer Engine duplicates: a dimension, and not tensor parallel."""
    source = with_facts(BEFORE_MARKS, tmp_path / "source", "linear_q_down_proj", partition_dim=0, tensor_parallel=False)
    expected = models(source)[0]["decoder.layers.0.self_attention.strange.weight"]
    for model in models(converted(source, tmp_path / "out", "--tp", "4")):
        assert_equal(model["decoder.layers.0.self_attention.strange.weight"], expected)


@pytest.mark.parametrize("facts", [{"partition_dim": -1, "tensor_parallel": True}, {"partition_stride": 2}],
                         ids=["contradictory", "strided"])
@pytest.mark.parametrize("source", [BEFORE_MARKS, MARKED], ids=["tp2", "tp1"])
def test_a_strange_tensor_whose_cut_the_facts_do_not_tell_is_refused(source, facts, tmp_path, capsys):
    strange = with_facts(source, tmp_path / "source", "linear_q_up_proj", **facts)
    assert main(["convert", str(strange), str(tmp_path / "out"), "--to", "megatron", "--tp", "4"]) == 2
    error = capsys.readouterr().err
    assert "nobody recorded how" in error and "strange.weight" in error and not (tmp_path / "out").exists()
    converted(strange, tmp_path / "same")
    assert_equal(models(tmp_path / "same"), models(strange))


def test_a_family_s_tensor_that_the_sidecar_contradicts_is_refused(tmp_path, capsys):
    source = shutil.copytree(BEFORE_MARKS, tmp_path / "source")
    for file in source.rglob("layout_*.json"):
        text = json.loads(file.read_text())
        for param in (p for optimizer in text["optimizers"] for buffer in optimizer["buffers"] for p in buffer["params"]):
            if param["name"].endswith("linear_proj.weight"):
                param["partition_dim"] = 0
        file.write_text(json.dumps(text))
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "megatron", "--weights-only", "--tp", "4"]) == 0
    assert main(["convert", str(source), str(tmp_path / "out2"), "--to", "megatron", "--tp", "4"]) == 2
    assert "contradict each other" in capsys.readouterr().err
