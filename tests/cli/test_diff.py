"""diff and digest over frameworks and layouts. The checkpoint of another layout is put together
here by hand, from what torch loads, and written by the safetensors library."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from parammap.cli.main import main
from parammap.proof import stream
from tests.support import paths
from tests.support.goldens import GOLDENS, joined, truth
from tests.support.logical import content_offset, flip

DATA = paths.TESTS / "data" / "megatron"
NAME = "cac60ce4_patched_legacy_tp2pp2"
GOLDEN = DATA / NAME
PADDED = DATA / "cac60ce4_patched_legacy_pp2dp3_untied_padded"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_whole(folder, arrays, **args):
    """A MindSpore checkpoint of one rank with these arguments of Megatron-LM's."""
    for name in ("pt_meta", "rank_0"):
        (folder / name).mkdir(parents=True)
    save_file(arrays, folder / "rank_0/network.safetensors")
    saved = argparse.Namespace(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        num_layers=4,
        num_attention_heads=4,
        data_parallel_size=1,
        **args,
    )
    torch.save({"args": saved, "iteration": 2}, folder / "pt_meta/args_tp00_pp000.pt")
    return folder


@pytest.fixture(
    params=[None, 1100, 100], ids=["bands", "bands of some rows", "bands of parts of rows"]
)
def band(request, monkeypatch):
    """The goldens' tensors fit one band, so it is made smaller."""
    if request.param:
        monkeypatch.setattr(stream, "BAND_BYTES", request.param)


@pytest.fixture
def whole(tmp_path):
    """That state as a MindSpore checkpoint of one rank, whose arguments do not say that its head is
    the embedding."""
    return save_whole(tmp_path / "whole", joined(GOLDEN))


def run(capsys, *arguments):
    capsys.readouterr()
    status = main([*map(str, arguments), "--json", "--workers", "1"])
    return status, json.loads(capsys.readouterr().out)


def edit(whole, change):
    arrays = joined(GOLDEN)
    change(arrays)
    save_file(arrays, whole / "rank_0/network.safetensors")


def test_layouts_and_frameworks_compare_equal(whole, band, tmp_path, capsys):
    assert main(["convert", str(GOLDEN), str(tmp_path / "out"), "--to", "mindspore"]) == 0
    elements = sum(array.size for array in joined(GOLDEN).values())
    for a, b in ((GOLDEN, whole), (whole, GOLDEN), (whole, tmp_path / "out")):
        status, facts = run(capsys, "diff", a, b)
        assert (
            status == 0
            and facts["elements_compared"] == elements
            and facts["tensors_compared"] == 207
        )
    digests = [
        {
            (e["role"], e["name"]): e["digest"]
            for e in run(capsys, "digest", folder)[1]["digests"]
            if e["role"] != "model_weight"
        }
        for folder in (GOLDEN, whole, tmp_path / "out")
    ]
    manifest = json.loads((tmp_path / "out/parammap_manifest.json").read_text())
    digests.append({(e["role"], e["name"]): e["digest"] for e in manifest["digests"]})
    heads = {
        (role, "output.weight"): digests[1].pop((role, "output.weight"))
        for role in ("weight", *MOMENTS)
    }
    assert digests[0] == digests[1] == digests[2] == digests[3] and len(digests[0]) == 204
    assert all(
        digest == digests[0][role, "embedding.word.weight"] for (role, _), digest in heads.items()
    )


def test_a_bit_is_found_in_any_layout(whole, band, capsys):
    """In the columns of the second tensor parallel rank; the digest of that tensor alone
    changes."""
    before = run(capsys, "digest", whole)[1]["digests"]
    name, array = (
        "exp_avg_sq.language_model.encoder.layers.3.attention.out_proj.weight",
        joined(GOLDEN),
    )
    file, flat = whole / "rank_0/network.safetensors", 11 * 64 + 40
    flip(file, content_offset(file, name, b"") + 4 * flat + 2, 7)
    status, facts = run(capsys, "diff", GOLDEN, whole)
    (difference,) = facts["differences"]
    (first,) = difference["first"]
    assert status == 1 and (difference["name"], difference["role"]) == (
        "layers.3.attention.out.weight",
        "exp_avg_sq",
    )
    assert (first["row"], first["column"], first["a"]) == (11, 40, float(array[name][11, 40]))
    assert difference["largest_difference"] == abs(first["a"] - first["b"]) > 0
    assert "mp_rank_01_001/distrib_optim.pt" in first["file_a"]
    with open(first["file_a"], "rb") as stream:
        stream.seek(first["offset_a"])
        assert np.frombuffer(stream.read(4), np.float32)[0] == array[name][11, 40]
    after = run(capsys, "digest", whole)[1]["digests"]
    assert [e["name"] for e, other in zip(before, after, strict=True) if e != other] == [
        "layers.3.attention.out.weight"
    ]


def test_tolerance_only_when_asked(whole, capsys):
    name = "language_model.encoder.layers.0.mlp.mapping.weight"

    def shift(arrays):
        arrays[name] = arrays[name] + np.float32(1e-3)
        arrays["exp_avg." + name][5, 6] = np.nan

    edit(whole, shift)
    status, facts = run(capsys, "diff", GOLDEN, whole)
    weight, moment = facts["differences"]
    assert (
        status == 1 and weight["elements"] == weight["of"] == 256 * 64 and len(weight["first"]) == 4
    )
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
            arrays[f"{role}language_model.encoder.layers.1.extra.weight"] = np.ones(
                (4, 4), np.float32
            )
            name = f"{role}language_model.embedding.word_embeddings.weight"
            arrays[name] = arrays[name][:-1].copy()

    edit(whole, change)
    status, facts = run(capsys, "diff", GOLDEN, whole)
    assert status == 1 and facts["only_in_a"] == [
        f"layers.1.attention.out.bias ({role})" for role in ("weight", "exp_avg", "exp_avg_sq")
    ]
    assert len(facts["only_in_b"]) == 3 and all(
        "extra.weight" in name for name in facts["only_in_b"]
    )
    assert [one["name"] for one in facts["differences"]] == ["embedding.word.weight"] * 3
    assert "shape" in facts["differences"][0]["other"]
    assert main(["diff", str(GOLDEN), str(whole)]) == 1
    assert "only in" in capsys.readouterr().out


def padded_to(rows):
    """The whole state of PADDED, whose vocabulary is 131, with its two tables cut to so many rows
    or, as they are, 144."""
    arrays = joined(PADDED)
    for name in arrays:
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            arrays[name] = arrays[name][:rows].copy()
    return arrays, {
        "tokenizer_type": "NullTokenizer",
        "vocab_size": 130,
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": rows,
        "untie_embeddings_and_output_weights": True,
    }


@pytest.mark.parametrize("rows", [136, 131])
def test_vocabularies_padded_otherwise_are_equal(rows, tmp_path, capsys):
    arrays, args = padded_to(rows)
    whole = save_whole(tmp_path / "whole", arrays, **args)
    padding = {
        f"{name}.padding ({role})"
        for name in ("embedding.word.weight", "output.weight")
        for role in ("weight", *MOMENTS)
    }
    for a, b in ((PADDED, whole), (whole, PADDED)):
        status, facts = run(capsys, "diff", a, b)
        assert (
            status == 0
            and set(facts["padding_not_compared"]) == padding
            and len(facts["padding_not_compared"]) == 6
        )
        assert facts["elements_compared"] == sum(array.size for array in padded_to(131)[0].values())
    assert main(["diff", str(PADDED), str(whole)]) == 0
    assert (
        "padding of the vocabulary, of another number of rows, was not compared"
        in capsys.readouterr().out
    )
    status, facts = run(capsys, "verify", whole, "--against", PADDED)
    assert status == 0 and any("padding of the vocabulary" in note for note in facts["notes"])
    digests = [
        {
            (e["role"], e["name"]): (e["digest"], e["shape"])
            for e in run(capsys, "digest", folder)[1]["digests"]
            if e["role"] != "model_weight"
        }
        for folder in (PADDED, whole)
    ]
    names = {(role, name) for (role, name) in digests[0] if not name.endswith(".padding")}
    assert (
        all(digests[0][key] == digests[1][key] for key in names)
        and len(names) == len(digests[0]) - 6
    )
    assert {
        tuple(shape) for (_, name), (_, shape) in digests[1].items() if name.endswith(".padding")
    } == ({(rows - 131, 64)} if rows > 131 else set())
    arrays["language_model.output_layer.weight"][130, 5] += 1
    save_file(arrays, whole / "rank_0/network.safetensors")
    status, facts = run(capsys, "diff", PADDED, whole)
    assert status == 1 and [(one["name"], one["elements"]) for one in facts["differences"]] == [
        ("output.weight", 1)
    ]


def test_padding_of_equal_size_is_compared(tmp_path, capsys):
    arrays, args = padded_to(144)
    whole = save_whole(tmp_path / "whole", arrays, **args)
    status, facts = run(capsys, "diff", PADDED, whole)
    assert status == 0 and facts["padding_not_compared"] == []
    arrays["exp_avg.language_model.embedding.word_embeddings.weight"][131, 0] += 1
    save_file(arrays, whole / "rank_0/network.safetensors")
    (difference,) = run(capsys, "diff", PADDED, whole)[1]["differences"]
    assert difference["name"] == "embedding.word.weight.padding"
    assert (difference["role"], difference["elements"]) == ("exp_avg", 1)


def test_a_head_that_should_be_the_embedding_is_compared_with_it(whole, capsys):
    """The golden's is, and it says so; the other side has it as a tensor of its own."""
    edit(whole, lambda arrays: arrays["language_model.output_layer.weight"].__setitem__((3, 4), 7))
    for a, b, names in (
        (GOLDEN, whole, ("embedding.word.weight", "output.weight")),
        (whole, GOLDEN, ("output.weight", "embedding.word.weight")),
    ):
        status, facts = run(capsys, "diff", a, b)
        (difference,) = facts["differences"]
        assert status == 1 and (difference["name"], difference["name_b"]) == names
        assert facts["only_in_a"] == facts["only_in_b"] == []
        assert {7.0} < {difference["first"][0]["a"], difference["first"][0]["b"]}
    edit(
        whole,
        lambda arrays: [
            arrays.pop(f"{role}language_model.output_layer.weight")
            for role in ("", "exp_avg.", "exp_avg_sq.")
        ],
    )
    assert run(capsys, "diff", GOLDEN, whole)[0] == 0


def test_dtypes_differ_unless_a_tolerance_is_asked_for(tmp_path, capsys):
    source = DATA / "cac60ce4_mcore_pp2dp2_llama"
    for flags in ((), ("--dtype", "float32")):
        assert (
            main(
                [
                    "convert",
                    str(source),
                    str(tmp_path / f"out{len(flags)}"),
                    "--to",
                    "mindspore",
                    "--weights-only",
                    *flags,
                ]
            )
            == 0
        )
    status, facts = run(capsys, "diff", tmp_path / "out0", tmp_path / "out2")
    assert status == 1 and all(
        one["other"] == "bfloat16 and float32" and not one["elements"]
        for one in facts["differences"]
    )
    assert run(capsys, "diff", tmp_path / "out0", tmp_path / "out2", "--atol", "0")[0] == 0
    assert run(capsys, "diff", source, tmp_path / "out0", "--weights-only")[0] == 0


def test_training_that_went_on_shows_in_the_metadata(tmp_path, capsys):
    assert main(["convert", str(GOLDEN), str(tmp_path / "out"), "--to", "mindspore"]) == 0
    for rank in range(4):
        file = tmp_path / f"out/rank_{rank}/network.ckpt"
        flip(file, content_offset(file, "state_step", np.float32(2).tobytes()) + 2, 7)
    status, facts = run(capsys, "diff", GOLDEN, tmp_path / "out")
    assert status == 1 and facts["differences"] == []
    step = facts["metadata"][0].removeprefix("steps: 2 and ")
    assert step != "2" and facts["metadata"] == [
        f"steps: 2 and {step}",
        *(f"groups[{number}].step: 2 and {step}" for number in range(2)),
    ]


def test_two_models_have_nothing_to_compare(whole, capsys):
    edit(
        whole,
        lambda arrays: (
            [arrays.pop(key) for key in list(arrays)]
            and arrays.update({"some.other.weight": np.ones((2, 2), np.float32)})
        ),
    )
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
    assert [e["name"] for e in facts["digests"] if e["digests_of_other_copies"]] == [
        "layers.2.input_norm.weight"
    ]
    assert (
        main(["digest", str(tmp_path / "out")]) == 1 and "copies differ" in capsys.readouterr().out
    )
    assert main(["digest", str(GOLDEN), "--workers", "2"]) == 0
