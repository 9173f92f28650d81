"""Alpa's serving weights, read again: verify, diff, digest and locate. What lies where is taken
from numpy and torch."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from parammap.cli.main import main
from tests.support import paths
from tests.support.alpa import GPT, HIDDEN, VOCAB, opt_weights, singleton
from tests.support.logical import flip
from tests.support.manifests import rewrite

DATA = paths.TESTS / "data/metaseq"
FP16, FP32 = DATA / "mp2dp2_fp16/checkpoint_3", DATA / "mp1dp3_fp32/checkpoint_3"
#: source, flags, whether the values are what they were, so that digests prove them
CASES = {"fp16": (FP16, ()), "fp32": (FP32, ("--dtype", "float32")), "rounded": (FP32, ())}
NAME = "decoder.layers.1.self_attn.v_proj.weight"
ATOM = "layers.1.attention.v.weight"


def convert(source, out, *flags):
    if source in (FP16, FP32) and not list(source.parent.glob("checkpoint_3-*.pt")):
        pytest.skip(
            f"{source.parent} is not there: it is written by metaseq itself, which is no package"
        )
    assert main(["convert", str(source), str(out), "--to", "alpa", "--workers", "1", *flags]) == 0
    return out


def run(capsys, *arguments):
    """Exit status and the JSON that a command prints."""
    capsys.readouterr()
    status = main([*map(str, arguments), "--json", "--workers", "1"])
    return status, json.loads(capsys.readouterr().out)


def byte_of(file, row, column):
    """Where an element begins: numpy's arrays end with the file."""
    array = np.load(file)
    return (
        file.stat().st_size
        - array.nbytes
        + (row * math.prod(array.shape[1:]) + column) * array.itemsize
    )


@pytest.mark.parametrize("case", CASES)
def test_an_output_is_verified(case, tmp_path, capsys):
    source, flags = CASES[case]
    out = convert(source, tmp_path / "out", *flags)
    status, alone = run(capsys, "verify", out)
    assert (status, alone["tensors_compared"]) == (0, 53)
    status, against = run(capsys, "verify", out, "--against", source)
    assert (status, against["tensors_compared"]) == (0, 53)
    assert against["notes"] == ["left out by the conversion: exp_avg, exp_avg_sq"]


@pytest.mark.parametrize("case", CASES)
def test_a_flipped_bit_is_found_and_repaired(case, tmp_path, capsys):
    source, flags = CASES[case]
    out = convert(source, tmp_path / "out", *flags)
    file, before = out / NAME, np.load(out / NAME)
    offset = byte_of(file, 7, 3)
    flip(file, offset, 0)
    after = np.load(file)
    assert np.argwhere(before != after).tolist() == [[7, 3]]
    wrong = {f"{ATOM} (weight)"}
    status, alone = run(capsys, "verify", out)
    assert status == 1 and {problem["name"] for problem in alone["problems"]} == wrong
    status, against = run(capsys, "verify", out, "--against", source)
    told = against["problems"][-1]["what"]
    assert status == 1 and {problem["name"] for problem in against["problems"]} == wrong
    assert "1 of 400 elements differ" in told and f"{file} byte {offset}" in told
    assert f"[7, 3] {after[7, 3]:.9g} and " in told
    assert (
        main(
            [
                "verify",
                str(out),
                "--against",
                str(source),
                "--repair",
                "--into",
                str(tmp_path / "copy"),
            ]
        )
        == 0
    )
    assert np.array_equal(np.load(tmp_path / "copy" / NAME), before)


def test_a_bfloat16_source_is_compared_across_the_cast(tmp_path, capsys):
    weights = opt_weights(torch.bfloat16)
    weights[NAME][2, 1] = 1e-6  # float16 has no such number
    source = singleton(tmp_path, weights)
    out = convert(source, tmp_path / "out")
    assert np.array_equal(np.load(out / NAME), weights[NAME].half().numpy())
    status, found = run(capsys, "verify", out, "--against", source)
    assert (status, found["tensors_compared"]) == (0, len(weights))
    flip(out / NAME, byte_of(out / NAME, 2, 1), 0)
    status, found = run(capsys, "verify", out, "--against", source)
    assert (
        status == 1
        and "1 of 576 elements differ" in found["problems"][-1]["what"]
        and "[2, 1]" in found["problems"][-1]["what"]
    )


def test_a_cast_must_be_declared(tmp_path, capsys):
    out = convert(FP32, tmp_path / "out")
    manifest = json.loads((out / "parammap_manifest.json").read_text())
    assert manifest["options"]["cast"] == "float16"
    rewrite(out, options=manifest["options"] | {"cast": None})
    for against in ((), ("--against", FP32)):
        status, found = run(capsys, "verify", out, *against)
        assert status == 1 and len({problem["name"] for problem in found["problems"]}) == 53
    assert run(capsys, "verify", out, "--cast", "float16", "--against", FP32)[0] == 0


def test_a_rounded_tensor_of_another_shape_is_wrong(tmp_path, capsys):
    out = convert(FP32, tmp_path / "out")
    name = "decoder.layers.0.fc1.weight"
    size = (out / name).stat().st_size
    np.save(tmp_path / "turned.npy", np.load(out / name).T.copy())
    shutil.copy(tmp_path / "turned.npy", out / name)
    assert (out / name).stat().st_size == size
    status, found = run(capsys, "verify", out)
    assert (
        status == 1 and "has the shape [20, 44] and not [44, 20]" in found["problems"][-1]["what"]
    )


def test_digests_are_the_sources(tmp_path, capsys):
    out = convert(FP16, tmp_path / "out")
    (_, mine), (_, theirs) = (run(capsys, "digest", folder)[1].popitem() for folder in (out, FP16))
    weights = {entry["name"]: entry["digest"] for entry in theirs if entry["role"] == "weight"}
    assert {entry["name"]: entry["digest"] for entry in mine} == weights and len(weights) == 53
    assert {entry["role"] for entry in mine} == {"weight"}


def test_diff_compares_folders_and_shards(tmp_path, capsys):
    out = convert(FP16, tmp_path / "out")
    status, found = run(capsys, "diff", out, FP16, "--weights-only")
    assert (status, found["tensors_compared"], found["elements_compared"]) == (
        0,
        53,
        sum(np.load(path).size for path in out.iterdir() if path.suffix != ".json"),
    )
    shutil.copytree(out, tmp_path / "other")
    (tmp_path / "other/parammap_manifest.json").unlink()
    array = np.load(out / NAME)
    array[5, 4] += 1
    with open(tmp_path / "other" / NAME, "wb") as file:
        np.save(file, array)
    status, found = run(capsys, "diff", out, tmp_path / "other")
    (one,) = found["differences"]
    assert status == 1 and (one["name"], one["elements"]) == (ATOM, 1)
    assert (one["first"][0]["row"], one["first"][0]["column"], one["first"][0]["b"]) == (
        5,
        4,
        float(array[5, 4]),
    )


def test_locate_names_file_and_byte(tmp_path, capsys):
    out = convert(FP16, tmp_path / "out")
    array, file = np.load(out / NAME), out / NAME
    for name in (NAME, ATOM):
        (one,) = run(capsys, "locate", out, f"{name}[7,3:9]")[1]
        assert (one["file"], one["key"], one["element"], one["bytes"]) == (
            str(file),
            NAME,
            7 * 20 + 3,
            12,
        )
        assert (one["offset"], one["first_value"]) == (byte_of(file, 7, 3), float(array[7, 3]))
        assert file.read_bytes()[one["offset"] : one["offset"] + 12] == array[7, 3:9].tobytes()
    text = json.dumps(
        run(capsys, "locate", out, "--file", NAME, "--offset", byte_of(file, 7, 3) + 1)[1]
    )
    assert ATOM in text and '"index": [7, 3]' in text
    assert "the header: dtype, order and shape" in json.dumps(
        run(capsys, "locate", out, "--file", NAME, "--offset", 9)[1]
    )
    manifest = "parammap_manifest.json"
    assert main(["locate", str(out), "--file", manifest, "--offset", "0"]) == 2


BROKEN = {  # what is done to the folder; what every command but verify says
    "a missing parameter": (
        lambda out: (out / NAME).unlink(),
        f"lacks 1 parameters of Alpa's OPT of 3 layers: {NAME};",
    ),
    "no words": (lambda out: (out / "decoder.embed_tokens.weight").unlink(), "lacks 1 parameters"),
    "a cut file": (
        lambda out: (out / NAME).write_bytes((out / NAME).read_bytes()[:-1]),
        f"{NAME}: has 927 bytes",
    ),
    "no array": (lambda out: (out / NAME).write_bytes(b"x" * 928), f"{NAME}: is no .npy file"),
    "a foreign file": (
        lambda out: (out / "notes.txt").write_text("x"),
        "notes.txt: is no parameter of Alpa's OPT",
    ),
    "another layer's": (
        lambda out: shutil.copy(out / NAME, out / NAME.replace(".1.", ".4.")),
        "lacks 31 parameters of Alpa's OPT of 5 layers",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused(case, tmp_path, capsys):
    out = convert(FP16, tmp_path / "out")
    spoil, message = BROKEN[case]
    spoil(out)
    for command in (["digest", out], ["diff", out, FP16], ["locate", out, NAME]):
        capsys.readouterr()
        assert main(list(map(str, command))) == 2
        said = capsys.readouterr().err
        assert message in said and str(out) in said and said.count("\n") == 1
    assert main(["verify", str(out)]) == (
        1 if case in ("a missing parameter", "no words", "a cut file") else 2
    )


def test_an_iteration_is_refused(tmp_path, capsys):
    out = convert(FP16, tmp_path / "out")
    assert main(["digest", str(out), "--iteration", "3"]) == 2
    assert "have no iteration and no sidecar; leave these flags out" in capsys.readouterr().err


def test_added_words_are_told_from_the_sources(tmp_path, capsys):
    source = singleton(tmp_path, opt_weights())
    out = convert(source, tmp_path / "out", "--dtype", "float32", "--vocab-size", str(VOCAB + 8))
    for against in ((), ("--against", source)):
        status, found = run(capsys, "verify", out, *against)
        assert (status, found["tensors_compared"]) == (0, len(opt_weights()))
    assert [
        (entry["name"], entry["shape"])
        for entry in run(capsys, "digest", out)[1]["digests"]
        if "word" in entry["name"]
    ] == [
        ("embedding.word.weight", [VOCAB, HIDDEN]),
        ("embedding.word.weight.padding", [8, HIDDEN]),
    ]
    flip(
        out / "decoder.embed_tokens.weight",
        byte_of(out / "decoder.embed_tokens.weight", VOCAB - 1, 2),
        1,
    )
    status, found = run(capsys, "verify", out, "--against", source)
    assert status == 1 and f"[{VOCAB - 1}, 2]" in found["problems"][-1]["what"]


@pytest.mark.parametrize("flags", [(), ("--vocab-size", "300")])
def test_a_megatron_gpt_has_fewer_positions(flags, trained, tmp_path, capsys):
    """OPT's two rows before the first position are the conversion's; a byte of those behind them is
    found."""
    source = trained(**GPT, no_args=True).path
    out = convert(source, tmp_path / "out", "--dtype", "float32", "--activation", "relu", *flags)
    for against in ((), ("--against", source)):
        status, found = run(capsys, "verify", out, *against)
        assert status == 0 and not found["problems"]
    file = out / "decoder.embed_positions.weight"
    (one,) = run(capsys, "locate", out, "embedding.position.weight[5,6]")[1]
    assert (one["offset"], one["first_value"]) == (byte_of(file, 7, 6), float(np.load(file)[7, 6]))
    flip(file, byte_of(file, 2, 1), 0)
    status, found = run(capsys, "verify", out, "--against", source)
    assert status == 1 and "[0, 1]" in found["problems"][-1]["what"]
