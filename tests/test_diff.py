"""diff and digest over frameworks and layouts. The checkpoint of another layout is put together here by hand, from what
torch loads, and written by the safetensors library."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from convert.cli import main
from convert.proof import stream
from tests.lab.logical import content_offset, flip
from tests.test_goldens import GOLDENS, truth

DATA = Path(__file__).parent / "data" / "megatron"
NAME = "cac60ce4_patched_legacy_tp2pp2"
GOLDEN = DATA / NAME
HEAD_ROWS = 3 * 16
_JOINED_ALONG = {"qkv_proj.weight": 0, "qkv_proj.bias": 0, "mapping.weight": 0, "mapping.bias": 0,
                 "word_embeddings.weight": 0, "output_layer.weight": 0, "out_proj.weight": 1, "projection.weight": 1}


def joined():
    """The golden's whole state as a run without parallelism would hold it: {MindSpore name: array}."""
    ranks, result = truth(GOLDEN, GOLDENS[NAME][0]), {}
    for pp in (0, 1):
        for name, first in ranks[0, pp].items():
            second = ranks[1, pp][name]
            along = _JOINED_ALONG.get(".".join(name.split(".")[-2:]))
            result[name] = first if along is None else np.concatenate([first, second], axis=along)
    return result


@pytest.fixture(params=[None, 1100, 100], ids=["bands", "bands of some rows", "bands of parts of rows"])
def band(request, monkeypatch):
    """The goldens' tensors fit one band, so it is made smaller."""
    if request.param:
        monkeypatch.setattr(stream, "BAND_BYTES", request.param)


@pytest.fixture
def whole(tmp_path):
    """That state as a MindSpore checkpoint of one rank."""
    folder = tmp_path / "whole"
    for name in ("pt_meta", "rank_0"):
        (folder / name).mkdir(parents=True)
    save_file(joined(), folder / "rank_0/network.safetensors")
    args = argparse.Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, num_layers=4,
                              num_attention_heads=4, data_parallel_size=1)
    torch.save({"args": args, "iteration": 2}, folder / "pt_meta/args_tp00_pp000.pt")
    return folder


def run(capsys, *arguments):
    capsys.readouterr()
    status = main([*map(str, arguments), "--json", "--workers", "1"])
    return status, json.loads(capsys.readouterr().out)


def edit(whole, change):
    arrays = joined()
    change(arrays)
    save_file(arrays, whole / "rank_0/network.safetensors")


def test_layouts_and_frameworks_compare_equal(whole, band, tmp_path, capsys):
    assert main(["convert", str(GOLDEN), str(tmp_path / "out"), "--to", "mindspore"]) == 0
    elements = sum(array.size for array in joined().values())
    for a, b in ((GOLDEN, whole), (whole, GOLDEN), (whole, tmp_path / "out")):
        status, facts = run(capsys, "diff", a, b)
        assert status == 0 and facts["elements_compared"] == elements and facts["tensors_compared"] == 207
    digests = [{(e["role"], e["name"]): e["digest"] for e in run(capsys, "digest", folder)[1]["digests"]
                if e["role"] != "model_weight"} for folder in (GOLDEN, whole, tmp_path / "out")]
    assert digests[0] == digests[1] == digests[2] and len(digests[0]) == 207
    manifest = json.loads((tmp_path / "out/parammap_manifest.json").read_text())
    assert {(e["role"], e["name"]): e["digest"] for e in manifest["digests"]} == digests[1]


def test_a_bit_is_found_in_any_layout(whole, band, capsys):
    """In the columns of the second tensor parallel rank; the digest of that tensor alone changes."""
    before = run(capsys, "digest", whole)[1]["digests"]
    name, array = "exp_avg_sq.language_model.encoder.layers.3.attention.out_proj.weight", joined()
    file, flat = whole / "rank_0/network.safetensors", 11 * 64 + 40
    flip(file, content_offset(file, name, b"") + 4 * flat + 2, 7)
    status, facts = run(capsys, "diff", GOLDEN, whole)
    difference, = facts["differences"]
    first, = difference["first"]
    assert status == 1 and (difference["name"], difference["role"]) == ("layers.3.attention.out.weight", "exp_avg_sq")
    assert (first["row"], first["column"], first["a"]) == (11, 40, float(array[name][11, 40]))
    assert difference["largest_difference"] == abs(first["a"] - first["b"]) > 0
    assert "mp_rank_01_001/distrib_optim.pt" in first["file_a"]
    with open(first["file_a"], "rb") as stream:
        stream.seek(first["offset_a"])
        assert np.frombuffer(stream.read(4), np.float32)[0] == array[name][11, 40]
    after = run(capsys, "digest", whole)[1]["digests"]
    assert [e["name"] for e, other in zip(before, after, strict=True) if e != other] == ["layers.3.attention.out.weight"]


def test_tolerance_only_when_asked(whole, capsys):
    name = "language_model.encoder.layers.0.mlp.mapping.weight"

    def shift(arrays):
        arrays[name] = arrays[name] + np.float32(1e-3)
        arrays["exp_avg." + name][5, 6] = np.nan

    edit(whole, shift)
    status, facts = run(capsys, "diff", GOLDEN, whole)
    weight, moment = facts["differences"]
    assert status == 1 and weight["elements"] == weight["of"] == 256 * 64 and len(weight["first"]) == 4
    assert weight["largest_difference"] == pytest.approx(1e-3, rel=1e-3)
    assert moment["elements"] == 1 and math.isnan(moment["first"][0]["b"])
    status, facts = run(capsys, "diff", GOLDEN, whole, "--atol", "2e-3")
    assert status == 1 and [one["role"] for one in facts["differences"]] == ["exp_avg"]
    edit(whole, lambda arrays: arrays.update({name: arrays[name] + np.float32(1e-3)}))
    assert run(capsys, "diff", GOLDEN, whole, "--atol", "2e-3")[0] == 0
    assert run(capsys, "diff", GOLDEN, whole, "--atol", "1e-4")[0] == 1
    edit(whole, lambda arrays: arrays.update({name: arrays[name] * np.float32(1.001)}))
    assert run(capsys, "diff", GOLDEN, whole, "--rtol", "0.002")[0] == 0
    assert run(capsys, "diff", GOLDEN, whole, "--rtol", "0.0005")[0] == 1
    assert main(["diff", str(GOLDEN), str(whole), "--atol", "-1"]) == 2


def test_what_only_one_has_and_other_shapes(whole, capsys):
    def change(arrays):
        for role in ("", "exp_avg.", "exp_avg_sq."):
            del arrays[f"{role}language_model.encoder.layers.1.attention.out_proj.bias"]
            arrays[f"{role}language_model.encoder.layers.1.extra.weight"] = np.ones((4, 4), np.float32)
            name = f"{role}language_model.embedding.word_embeddings.weight"
            arrays[name] = arrays[name][:-1].copy()

    edit(whole, change)
    status, facts = run(capsys, "diff", GOLDEN, whole)
    assert status == 1 and facts["only_in_a"] == [
        f"layers.1.attention.out.bias ({role})" for role in ("weight", "exp_avg", "exp_avg_sq")]
    assert len(facts["only_in_b"]) == 3 and all("extra.weight" in name for name in facts["only_in_b"])
    assert [one["name"] for one in facts["differences"]] == ["embedding.word.weight"] * 3
    assert "shape" in facts["differences"][0]["other"]
    assert main(["diff", str(GOLDEN), str(whole)]) == 1
    assert "only in" in capsys.readouterr().out


def test_dtypes_differ_unless_a_tolerance_is_asked_for(tmp_path, capsys):
    source = DATA / "cac60ce4_mcore_pp2dp2_llama"
    for flags in ((), ("--dtype", "float32")):
        assert main(["convert", str(source), str(tmp_path / f"out{len(flags)}"), "--to", "mindspore", "--weights-only",
                     *flags]) == 0
    status, facts = run(capsys, "diff", tmp_path / "out0", tmp_path / "out2")
    assert status == 1 and all(one["other"] == "bfloat16 and float32" and not one["elements"]
                               for one in facts["differences"])
    assert run(capsys, "diff", tmp_path / "out0", tmp_path / "out2", "--atol", "0")[0] == 0
    assert run(capsys, "diff", source, tmp_path / "out0", "--weights-only")[0] == 0


def test_training_that_went_on_shows_in_the_metadata(tmp_path, capsys):
    assert main(["convert", str(GOLDEN), str(tmp_path / "out"), "--to", "mindspore"]) == 0
    for rank in range(4):
        file = tmp_path / f"out/rank_{rank}/network.ckpt"
        flip(file, content_offset(file, "state_step", np.float32(2).tobytes()) + 2, 7)
    status, facts = run(capsys, "diff", GOLDEN, tmp_path / "out")
    assert status == 1 and facts["differences"] == [] and all(".step: 2 and " in line for line in facts["metadata"])


def test_two_models_have_nothing_to_compare(whole, capsys):
    edit(whole, lambda arrays: [arrays.pop(key) for key in list(arrays)] and arrays.update(
        {"some.other.weight": np.ones((2, 2), np.float32)}))
    assert main(["diff", str(GOLDEN), str(whole)]) == 2
    assert "nothing was compared" in capsys.readouterr().err


def test_replicas_that_differ_are_listed(tmp_path, capsys):
    """A norm is kept by every tensor parallel rank; one copy is changed."""
    assert main(["convert", str(GOLDEN), str(tmp_path / "out"), "--to", "mindspore"]) == 0
    name = "language_model.encoder.layers.2.input_norm.gamma"
    file = tmp_path / "out/rank_3/network.ckpt"
    content = truth(GOLDEN, GOLDENS[NAME][0])[1, 1][name].tobytes()
    flip(file, content_offset(file, name, content) + 9, 1)
    status, facts = run(capsys, "digest", tmp_path / "out")
    assert status == 1
    assert [e["name"] for e in facts["digests"] if e["digests_of_other_copies"]] == ["layers.2.input_norm.weight"]
    assert main(["digest", str(tmp_path / "out")]) == 1 and "copies differ" in capsys.readouterr().out
    assert main(["digest", str(GOLDEN), "--workers", "2"]) == 0
