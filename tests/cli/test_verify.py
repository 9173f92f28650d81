"""verify finds every bit that is wrong in an output, names it, and repairs it. What lies where is
taken from what MindSpore and torch load, never from our own readers."""

import dataclasses
import json
import math
import random
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from parammap.checkpoint.manifest import MANIFEST
from parammap.cli.main import main
from parammap.plan import planner
from parammap.proof import stream
from parammap.tensors.region import whole
from tests.support import paths
from tests.support.logical import content_offset, element, flip
from tests.support.manifests import rewrite
from tests.support.mindspore_load import load
from tests.support.runs import every_run
from tests.support.torch_load import StandIn, torch_load

DATA = paths.TESTS / "data" / "megatron"
GOLDEN, LLAMA = DATA / "cac60ce4_patched_legacy_tp2pp2", DATA / "cac60ce4_mcore_pp2dp2_llama"
PADDED = DATA / "cac60ce4_patched_legacy_pp2dp3_untied_padded"
#: (tp, pp) of each rank folder of the golden's conversion
RANKS = {0: (0, 0), 1: (1, 0), 2: (0, 1), 3: (1, 1)}


def convert(source, out, to, *flags):
    assert main(["convert", str(source), str(out), "--to", to, "--workers", "1", *flags]) == 0
    return out


def run(capsys, *arguments):
    """Exit status and the JSON that a command prints."""
    capsys.readouterr()
    status = main([*map(str, arguments), "--json", "--workers", "1"])
    return status, json.loads(capsys.readouterr().out)


def covered_by_manifest(out):
    """Every byte but the manifest's own."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != MANIFEST]
    return {"manifest": sum(path.stat().st_size for path in files), "records": 0, "none": 0}


def names(problems):
    return {problem["name"] for problem in problems if problem["name"] != "metadata"}


@pytest.fixture(scope="module", params=["ckpt", "safetensors"])
def output(request, tmp_path_factory):
    """An output of the golden, and what MindSpore loads of each file."""
    folder = tmp_path_factory.mktemp(request.param)
    out = convert(GOLDEN, folder / "out", "mindspore", "--format", request.param)
    files = [out / f"rank_{rank}/network.{request.param}" for rank in RANKS]
    return out, dict(zip(files, load(files, folder / "loaded"), strict=True))


def random_flips(rng, loaded, count):
    """Bits of `count` logical tensors, one of each: {(role, atom): (file, byte, bit, row, column,
    value before)}."""
    flips = {}
    while len(flips) < count:
        file = rng.choice(list(loaded))
        key = rng.choice(
            [key for key in loaded[file] if key.startswith(("language_model.", "exp_avg"))]
        )
        array = loaded[file][key]
        flat, bit = rng.randrange(array.size), rng.randrange(32)
        role, atom, row, column = element(
            key, array.shape, flat, RANKS[int(file.parent.name[5:])][0]
        )
        offset = content_offset(file, key, array.tobytes()) + 4 * flat
        flips.setdefault((role, atom), (file, offset, bit, row, column, array.flat[flat]))
    return flips


def flipped(value, bit):
    (number,) = struct.unpack("<I", struct.pack("<f", value))
    return np.uint32(number ^ 1 << bit)


def bits(value):
    return np.float32(value).view(np.uint32)


@pytest.mark.parametrize("seed", range(5))
def test_any_flipped_bit_is_found(output, seed, capsys):
    """20 bits at a time in as many tensors, five times in each format: all 200 are found, and
    nothing else."""
    out, loaded = output
    flips = random_flips(random.Random(seed), loaded, 20)
    for file, offset, bit, *_ in flips.values():
        flip(file, offset + bit // 8, bit % 8)
    try:
        wrong = {f"{atom} ({role})" for role, atom in flips}
        status, found = run(capsys, "verify", out)
        assert status == 1 and names(found["problems"]) == wrong and len(found["problems"]) == 20
        status, found = run(capsys, "verify", out, "--against", GOLDEN)
        assert status == 1 and names(found["problems"]) == wrong
        told = {
            problem["name"]: problem["what"]
            for problem in found["problems"]
            if "1 of " in problem["what"]
        }
        status, differences = run(capsys, "diff", GOLDEN, out)
        assert status == 1 and len(differences["differences"]) == 20
        by_name = {(one["role"], one["name"]): one for one in differences["differences"]}
        for (role, atom), (file, offset, bit, row, column, value) in flips.items():
            assert f"[{row}, {column}]" in told[f"{atom} ({role})"]
            assert f"{file} byte {offset}," in told[f"{atom} ({role})"]
            (first,) = by_name[role, atom]["first"]
            assert by_name[role, atom]["elements"] == 1
            assert (first["row"], first["column"], first["file_b"], first["offset_b"]) == (
                row,
                column,
                str(file),
                offset,
            )
            assert bits(first["a"]) == bits(value)
            assert bits(first["b"]) == flipped(value, bit) or math.isnan(first["b"])
    finally:
        for file, offset, bit, *_ in flips.values():
            flip(file, offset + bit // 8, bit % 8)
    assert run(capsys, "verify", out, "--against", GOLDEN)[0] == 0


def test_a_scalar_is_found(output, capsys):
    out, loaded = output
    for name in ("state_step", "learning_rate_group_0", "max_lr", "num_steps"):
        file = list(loaded)[2]
        offset = content_offset(file, name, loaded[file][name].tobytes())
        flip(file, offset, 3)
        status, found = run(capsys, "verify", out)
        flip(file, offset, 3)
        assert status == 1 and names(found["problems"]) == {name}


def test_an_equal_output_is_proved_and_says_how_much(output, capsys):
    out, _ = output
    assert run(capsys, "verify", out) == (
        0,
        {
            "output": str(out),
            "problems": [],
            "notes": [],
            "tensors_compared": 204,
            "bytes_covered": covered_by_manifest(out),
        },
    )


def test_two_rows_swapped_by_a_wrong_plan_are_caught(tmp_path, monkeypatch, capsys):
    """The copier's own digests are those of the source; only reading the output again can tell."""
    planned = planner.Planner.fills

    def swap(self, wanted, place):
        if wanted.spec.name == "exp_avg.language_model.encoder.layers.2.attention.qkv_proj.weight":
            q, *others = wanted.parts
            a, b = (q.cut(whole(q.view.shape).narrow(0, row, row + 1)) for row in range(2))
            assert a.region.sizes == b.region.sizes and len(q.view.shape) == 3
            rest = (
                [q.cut(whole(q.view.shape).narrow(0, 2, q.view.shape[0]))]
                if q.view.shape[0] > 2
                else []
            )
            swapped = (
                dataclasses.replace(a, view=b.view),
                dataclasses.replace(b, view=a.view),
                *rest,
                *others,
            )
            wanted = dataclasses.replace(wanted, parts=swapped)
        return planned(self, wanted, place)

    monkeypatch.setattr(planner.Planner, "fills", swap)
    out = convert(GOLDEN, tmp_path / "out", "mindspore")
    status, found = run(capsys, "verify", out)
    assert status == 1 and names(found["problems"]) == {"layers.2.attention.q.weight (exp_avg)"}
    assert run(capsys, "diff", GOLDEN, out)[1]["differences"][0]["elements"] == 2 * 2 * 16 * 64


@pytest.mark.parametrize("form", ["ckpt", "safetensors", "pt"])
def test_repair_restores_every_byte(form, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        stream, "BAND_BYTES", {"ckpt": 100, "safetensors": 1100, "pt": stream.BAND_BYTES}[form]
    )
    out = convert(
        GOLDEN, tmp_path / "ms", "mindspore", *(() if form == "pt" else ("--format", form))
    )
    source = GOLDEN
    if form == "pt":
        source, out = out, convert(out, tmp_path / "back", "megatron")
    shutil.copytree(out, tmp_path / "wrong")
    wrong = tmp_path / "wrong"
    rng = random.Random(7)
    for file, start, nbytes in (places_in_archives if form == "pt" else places_in_files)(
        wrong, tmp_path
    ):
        for _ in range(5):
            flip(file, start + rng.randrange(nbytes), rng.randrange(8))
    copy = tmp_path / "copy"
    assert contents(wrong) != contents(out)
    assert main(["verify", str(wrong), "--against", str(source), "--repair"]) == 2
    assert (
        main(["verify", str(wrong), "--against", str(source), "--repair", "--into", str(copy)]) == 0
    )
    assert contents(copy) == contents(out) != contents(wrong)
    assert (
        main(["verify", str(wrong), "--against", str(source), "--repair", "--into", str(copy)]) == 2
    )
    assert "exists" in capsys.readouterr().err
    assert main(["verify", str(wrong), "--against", str(source), "--repair", "--in-place"]) == 0
    assert contents(wrong) == contents(out)


def places_in_archives(folder, tmp_path):
    """(file, first byte, bytes) of parameters in each optimizer file, by what torch loads and the
    live index map."""
    for path in sorted((GOLDEN / "truth").glob("rank*.json")):
        rank = json.loads(path.read_text())
        file = folder / f"iter_0000002/mp_rank_{rank['tp']:02d}_{rank['pp']:03d}/distrib_optim.pt"
        (states,) = torch.load(file, weights_only=True)[0].values()
        _, _, start, end, bucket = max(
            rank["chunks"][0]["params"], key=lambda param: param[3] - param[2]
        )
        first = start - rank["chunks"][0]["bucket_indices"][bucket][0]
        content = states["exp_avg"][bucket].numpy().tobytes()
        yield file, file.read_bytes().index(content) + 4 * first, 4 * (end - start)


def places_in_files(folder, tmp_path):
    """(file, first byte, bytes) of the largest tensor of each file, by what MindSpore loads."""
    files = sorted(folder.rglob("network.*"))
    for file, arrays in zip(files, load(files, tmp_path / "loaded"), strict=True):
        key = max(arrays, key=lambda name: arrays[name].size)
        yield file, content_offset(file, key, arrays[key].tobytes()), arrays[key].nbytes


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_megatron_output_is_proved_to_the_last_byte(tmp_path, capsys):
    """A bit in the pickled arguments, which are no tensor, and one in the copy of a weight that the
    model computes with."""
    ms = convert(GOLDEN, tmp_path / "ms", "mindspore")
    back = convert(ms, tmp_path / "back", "megatron")
    assert run(capsys, "verify", back, "--against", GOLDEN)[0] == 0
    model = back / "iter_0000002/mp_rank_01_000/model_optim_rng.pt"
    argument = model.read_bytes().index(b"num_attention_heads") + 3
    flip(model, argument, 0)
    status, found = run(capsys, "verify", back)
    flip(model, argument, 0)
    assert status == 1 and [problem["name"] for problem in found["problems"]] == [str(model)]
    assert "data.pkl" in found["problems"][0]["what"]
    weight = torch_load(model)["model"]["language_model"]["encoder"][
        "layers.1.self_attention.dense.weight"
    ]
    flip(model, model.read_bytes().index(weight.view(torch.uint16).numpy().tobytes()) + 2 * 37, 1)
    wrong = "layers.1.attention.out.weight (model_weight)"
    for arguments in ((), ("--against", ms), ("--against", GOLDEN)):
        status, found = run(capsys, "verify", back, *arguments)
        assert status == 1 and names(found["problems"]) == {wrong, str(model)}
        assert all(
            f"[{37 // 32}, {32 + 37 % 32}]" in p["what"]
            for p in found["problems"]
            if p["name"] == wrong
        )


def test_a_declared_cast_is_no_difference(tmp_path, capsys):
    out = convert(LLAMA, tmp_path / "out", "mindspore", "--weights-only", "--dtype", "float32")
    assert run(capsys, "verify", out)[0] == run(capsys, "verify", out, "--against", LLAMA)[0] == 0
    file = out / "rank_0/network.ckpt"
    (arrays,) = load([file], tmp_path / "loaded")
    name = "language_model.encoder.layers.1.mlp.mapping.weight"
    for byte in (0, 3):
        offset = content_offset(file, name, arrays[name].tobytes()) + 4 * 9 + byte
        flip(file, offset, 0)
        for against in ((), ("--against", LLAMA)):
            status, found = run(capsys, "verify", out, *against)
            assert status == 1 and names(found["problems"]) == {"layers.1.mlp.gate.weight (weight)"}
        flip(file, offset, 0)
    manifest = json.loads((out / "parammap_manifest.json").read_text())
    rewrite(out, options=manifest["options"] | {"cast": None})
    status, found = run(capsys, "verify", out)
    assert status == 1 and all(
        "names no such cast" in problem["what"] for problem in found["problems"]
    )
    assert run(capsys, "verify", out, "--cast", "float32")[0] == 0
    (out / "parammap_manifest.json").unlink()
    assert (
        run(capsys, "verify", out, "--against", LLAMA, "--weights-only", "--cast", "float32")[0]
        == 0
    )
    assert run(capsys, "verify", out, "--against", LLAMA, "--weights-only")[0] == 1


def test_missing_and_cut_files_are_listed(tmp_path, capsys):
    out = convert(GOLDEN, tmp_path / "out", "mindspore")
    whole = (out / "rank_1/network.ckpt").read_bytes()
    (out / "rank_1/network.ckpt").write_bytes(whole[:-100])
    (out / "pt_meta/args_tp00_pp001.pt").unlink()
    status, found = run(capsys, "verify", out)
    assert status == 1 and len(found["problems"]) == 2
    assert (
        f"has {len(whole) - 100} bytes"
        in found["problems"][0]["what"] + found["problems"][1]["what"]
    )


def test_without_a_manifest_only_the_structure_is_checked_and_that_is_said(tmp_path, capsys):
    assert main(["verify", str(GOLDEN)]) == 0
    assert "only its structure was checked" in capsys.readouterr().out


def test_another_model_is_no_empty_success(tmp_path, capsys):
    out = convert(LLAMA, tmp_path / "out", "mindspore", "--weights-only")
    assert main(["verify", str(out), "--against", str(GOLDEN), "--workers", "1"]) == 1
    assert "is missing" in capsys.readouterr().out


def test_padding_of_the_vocabulary_is_proved(tmp_path, capsys):
    out = convert(PADDED, tmp_path / "out", "mindspore")
    file, name = (
        out / "rank_0/network.ckpt",
        "exp_avg.language_model.embedding.word_embeddings.weight",
    )
    (arrays,) = load([file], tmp_path / "loaded")
    start = content_offset(file, name, arrays[name].tobytes())
    for row, wrong in (
        (130, "embedding.word.weight (exp_avg)"),
        (131, "embedding.word.weight.padding (exp_avg)"),
        (143, "embedding.word.weight.padding (exp_avg)"),
    ):
        flip(file, start + 4 * 64 * row, 3)
        for against in ((), ("--against", PADDED)):
            status, found = run(capsys, "verify", out, *against)
            assert status == 1 and names(found["problems"]) == {wrong}
        flip(file, start + 4 * 64 * row, 3)
    assert run(capsys, "verify", out)[0] == 0


def test_a_missing_copy_of_the_tied_head_is_found(tmp_path, capsys):
    """The first stage's embedding is there, and no tensor is missing but this copy of it."""
    out = convert(GOLDEN, tmp_path / "out", "mindspore", "--format", "safetensors")
    (out / "parammap_manifest.json").unlink()
    file = out / "rank_3/network.safetensors"
    arrays = load_file(file)
    del arrays["exp_avg.language_model.output_layer.weight"]
    save_file(arrays, file)
    status, found = run(capsys, "verify", out)
    assert status == 1 and [problem["what"] for problem in found["problems"]] == [
        "lacks the output layer's copy of embedding.word.weight (exp_avg) of tp 1"
    ]


def test_a_tied_head_is_proved_where_the_output_does_not_know_it_is_one(tmp_path, capsys):
    """Arguments of a release that had no untied heads: the legacy name in the source says it, the
    output's does not."""
    source = Path(shutil.copytree(GOLDEN, tmp_path / "source"))
    for file in source.glob("iter_*/mp_rank_*/model_optim_rng.pt"):
        saved = torch_load(file)
        for name, value in list(vars(saved["args"]).items()):
            if name == "untie_embeddings_and_output_weights" or isinstance(value, StandIn):
                delattr(saved["args"], name)
        torch.save(saved, file)
    out = convert(source, tmp_path / "out", "mindspore")
    assert run(capsys, "verify", out)[1] == {
        "output": str(out),
        "problems": [],
        "notes": [],
        "tensors_compared": 207,
        "bytes_covered": covered_by_manifest(out),
    }
    assert (
        run(capsys, "verify", out, "--against", source)[0]
        == run(capsys, "diff", source, out)[0]
        == 0
    )
    file, name = out / "rank_2/network.ckpt", "exp_avg.language_model.output_layer.weight"
    (arrays,) = load([file], tmp_path / "loaded")
    flip(file, content_offset(file, name, arrays[name].tobytes()), 3)
    status, found = run(capsys, "verify", out)
    assert status == 1 and names(found["problems"]) == {"output.weight (exp_avg)"}


@every_run("tp2pp2", "vpp", "dp3_padded", "moe_ep2", "fp32_own_group")
def test_trained_checkpoints_are_proved_there_and_back(
    trained_variant, tmp_path, core, variant, capsys
):
    source = trained_variant(core, variant).path
    names = ("--names", "megatron") if variant == "fp32_own_group" else ()
    out = convert(source, tmp_path / "out", "mindspore", *names)
    for pair in ((out, source), (out, out)):
        assert run(capsys, "verify", pair[0], "--against", pair[1])[0] == 0
    assert run(capsys, "diff", source, out)[0] == 0
    back = convert(out, tmp_path / "back", "megatron")
    assert run(capsys, "verify", back, "--against", source)[0] == 0
    digests = [
        {(e["role"], e["name"]): e["digest"] for e in run(capsys, "digest", folder)[1]["digests"]}
        for folder in (source, out, back)
    ]
    assert (
        digests[0] == digests[2]
        and digests[1].items() <= digests[0].items()
        and len(digests[1]) > 20
    )


@pytest.mark.parametrize("flags", [("--make-vocab-size-divisible-by", "300"), ("--tp", "1")])
def test_a_vocabulary_padded_anew_is_no_difference(trained, tmp_path, capsys, flags):
    source = trained(
        core="0.16.1", layers=4, hidden=64, heads=8, bucket=20_000, tp=2, pp=2, dp=2
    ).path
    out = convert(source, tmp_path / "out", "megatron", *flags)
    status, found = run(capsys, "verify", out)
    assert (status, found["problems"]) == (0, []) and found["tensors_compared"] > 30


def test_a_byte_that_is_no_tensors_is_found_by_its_checksum_whatever_the_file_is_called(
    tmp_path, capsys
):
    """torch.load ignores the CRC-32 of a record."""
    out = convert(
        paths.TESTS / "data/merak/hf", tmp_path / "out", "transformers", "--format", "bin"
    )
    file = out / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        (record,) = (one for one in archive.infolist() if one.filename.endswith("/version"))
    flip(file, file.read_bytes().index(b"3\n", record.header_offset + len(record.filename)), 0)
    status, found = run(capsys, "verify", out)
    assert (status, names(found["problems"])) == (1, {str(file)})
    assert record.filename in found["problems"][0]["what"]
