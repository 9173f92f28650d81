"""locate: the bytes it names, read straight from the file, are the value that torch or MindSpore
loads; and back again."""

import json
import random

import numpy as np
import pytest
import torch

from parammap.cli.main import main
from tests.support import paths
from tests.support.logical import content_offset, element
from tests.support.mindspore_load import load
from tests.support.torch_load import torch_load

DATA = paths.TESTS / "data" / "megatron"
GOLDEN = DATA / "cac60ce4_patched_legacy_tp2pp2"
PADDED = DATA / "cac60ce4_patched_legacy_pp2dp3_untied_padded"
BUCKETS = [GOLDEN.name, "cac60ce4_patched_legacy_pp4vpp2", PADDED.name]
#: the two tensors of MindSpore's model that are copies of the word embedding
TIED = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
PREFIXES = {"param": "weight.", "exp_avg": "exp_avg.", "exp_avg_sq": "exp_avg_sq."}


def locate(capsys, checkpoint, *arguments):
    capsys.readouterr()
    assert main(["locate", str(checkpoint), *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def read(path, offset, nbytes):
    with open(path, "rb") as stream:
        stream.seek(offset)
        return stream.read(nbytes)


def subscripted(tree, key):
    """tree[…][…], as a user would type the key after torch.load(file)."""
    return eval(f"tree{key}", {"tree": tree, "torch": torch})


def place(tp, pp, vpp=0):
    return ("--tp", tp, "--pp", pp, "--vpp", vpp)


def assert_way_back(capsys, checkpoint, found, rng):
    back = locate(
        capsys, checkpoint, "--file", found["file"], "--offset", found["offset"] + rng.randrange(4)
    )
    assert (
        found in back["elements"]
        and back["key"] == found["key"]
        and back["element"] == found["element"]
    )


@pytest.mark.parametrize("name", BUCKETS)
def test_elements_of_padded_buckets(name, capsys):
    """core 0.6: lists of buckets; tensor parallel pieces, virtual stages, padding."""
    rng, source = random.Random(name), DATA / name
    for path in sorted((source / "truth").glob("rank*.json")):
        rank = json.loads(path.read_text())
        if rank["dp"]:
            continue
        folder = source / f"iter_0000002/mp_rank_{rank['tp']:02d}_{rank['pp']:03d}"
        saved = torch.load(folder / "distrib_optim.pt", weights_only=True)
        for gbuf, live in enumerate(rank["chunks"]):
            for key, prefix in PREFIXES.items():
                parameter, shape, start, end, _ = rng.choice(live["params"])
                flat = rng.randrange(end - start)
                (states,) = saved[gbuf].values()
                value = torch.cat([bucket.view(-1) for bucket in states[key]])[start + flat]
                stored = parameter.replace(
                    "module.word_embeddings.", "module.word_embeddings_for_head."
                )
                index = ",".join(map(str, np.unravel_index(flat, shape)))
                (found,) = locate(
                    capsys,
                    source,
                    f"{prefix}{stored}[{index}]",
                    *place(rank["tp"], rank["pp"], live["chunk"]),
                )
                assert found["file"] == str(folder / "distrib_optim.pt") and found["bytes"] == 4
                assert read(found["file"], found["offset"], 4) == value.numpy().tobytes()
                loaded = subscripted(saved, found["key"]).view(-1)[found["element"]]
                assert loaded == value and found["first_value"] == value.item()
                assert_way_back(capsys, source, found, rng)


def test_elements_of_coalesced_buckets(trained_variant, capsys):
    rng, run = random.Random(1), trained_variant("0.16.1", "tp2pp2")
    for truth in run.truths():
        folder = run.rank_folder(truth)
        saved = torch.load(folder / "distrib_optim.pt", weights_only=True)
        for chunk, name in rng.sample(list(truth.names()), 6):
            for role, prefix in (
                ("main", "weight."),
                ("exp_avg", "exp_avg."),
                ("exp_avg_sq", "exp_avg_sq."),
            ):
                array = truth.array(chunk, name, role)
                flat = rng.randrange(array.size)
                index = ",".join(map(str, np.unravel_index(flat, array.shape)))
                (found,) = locate(
                    capsys, run.path, f"{prefix}{name}[{index}]", *place(*truth.place[:2], chunk)
                )
                assert found["file"] == str(folder / "distrib_optim.pt")
                assert read(found["file"], found["offset"], 4) == array.flat[flat].tobytes()
                loaded = subscripted(saved, found["key"]).view(-1)[found["element"]]
                assert loaded.item() == array.flat[flat]
                assert_way_back(capsys, run.path, found, rng)


def test_elements_of_model_files(capsys):
    rng = random.Random(2)
    for tp, pp in ((0, 0), (1, 0), (0, 1), (1, 1)):
        path = GOLDEN / f"iter_0000002/mp_rank_{tp:02d}_{pp:03d}/model_optim_rng.pt"
        saved = torch_load(path)
        model = saved["model"]["language_model"]["encoder"]
        for key in rng.sample(
            sorted(key for key, value in model.items() if isinstance(value, torch.Tensor)), 8
        ):
            flat = rng.randrange(model[key].numel())
            index = ",".join(map(str, np.unravel_index(flat, model[key].shape)))
            name = f"language_model.encoder.{key}"
            (found,) = locate(capsys, GOLDEN, f"model_weight.{name}[{index}]", *place(tp, pp))
            value = model[key].reshape(-1)[flat]
            assert found["file"] == str(path) and found["bytes"] == 2
            assert read(path, found["offset"], 2) == value.view(torch.uint16).numpy().tobytes()
            assert subscripted(saved, found["key"]).view(-1)[found["element"]] == value
            assert found["first_value"] == value.item()
            both = locate(capsys, GOLDEN, f"{name}[{index}]", *place(tp, pp))
            assert [one["role"] for one in both] == ["weight", "model_weight"] and found in both


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_elements_of_mindspore_files(form, tmp_path, capsys):
    """By the file's own name, and by the atom's: both are the same byte."""
    rng, out = random.Random(3), tmp_path / "out"
    assert main(["convert", str(GOLDEN), str(out), "--to", "mindspore", "--format", form]) == 0
    files = {
        out / f"rank_{number}/network.{form}": (number % 2, number // 2) for number in range(4)
    }
    for (file, (tp, pp)), arrays in zip(
        files.items(), load(list(files), tmp_path / "loaded"), strict=True
    ):
        for key in rng.sample(
            [key for key in sorted(arrays) if key.startswith(("language_model.", "exp_avg"))], 25
        ):
            flat = rng.randrange(arrays[key].size)
            index = ",".join(map(str, np.unravel_index(flat, arrays[key].shape)))
            (found,) = locate(capsys, out, f"{key}[{index}]", *place(tp, pp))
            assert (found["file"], found["key"], found["element"]) == (str(file), key, flat)
            assert read(file, found["offset"], 4) == arrays[key].flat[flat].tobytes()
            role, atom, row, column = element(key, arrays[key].shape, flat, tp)
            assert (found["role"], found["tensor"], found["index"]) == (role, atom, [row, column])
            one_dim = len(found["shape"]) == 1
            again = locate(capsys, out, f"{role}.{atom}[{row}{'' if one_dim else f',{column}'}]")
            keys = {key, *(key.replace(*tied) for tied in (TIED, TIED[::-1]))}
            assert found in again and {one["key"] for one in again} == keys
            assert_way_back(capsys, out, found, rng)


def test_a_slice_is_a_list_of_byte_ranges(capsys):
    """Columns 30 to 34 of an attention output, cut in the middle by tensor parallelism: both ranks,
    row by row."""
    query = "exp_avg.layers.1.attention.out.weight"
    runs = locate(capsys, GOLDEN, f"{query}[3:6, 30:34]")
    assert len(runs) == 6 and {run["bytes"] for run in runs} == {8}
    singles = [
        locate(capsys, GOLDEN, f"{query}[{row},{column}]")[0]
        for row in range(3, 6)
        for column in range(30, 34)
    ]
    spread = {(run["file"], run["offset"] + at) for run in runs for at in (0, 4)}
    assert spread == {(one["file"], one["offset"]) for one in singles}
    whole = locate(capsys, GOLDEN, query)
    assert [run["bytes"] for run in whole] == [64 * 32 * 4] * 2
    rows = locate(capsys, GOLDEN, f"{query}[2:4]")
    assert [run["bytes"] for run in rows] == [2 * 32 * 4] * 2
    assert (
        len(locate(capsys, GOLDEN, "layers.0.input_norm.weight[5]")) == 4
    )  # two ranks, the optimizer's and the model's


def test_what_else_lies_in_a_file(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(GOLDEN), str(out), "--to", "mindspore"]) == 0
    file = out / "rank_2/network.ckpt"
    step = content_offset(file, "state_step", np.float32(2).tobytes())
    assert locate(capsys, out, "--file", file, "--offset", step)["what"] == "scalar"
    assert locate(capsys, out, "--file", file, "--offset", step)["key"] == "state_step"
    assert "header" in locate(capsys, out, "--file", "rank_2/network.ckpt", "--offset", 0)["what"]
    model = GOLDEN / "iter_0000002/mp_rank_00_000/model_optim_rng.pt"
    pickled = model.read_bytes().index(b"num_attention_heads")
    assert "data.pkl" in locate(capsys, GOLDEN, "--file", model, "--offset", pickled)["what"]
    assert "structure" in locate(capsys, GOLDEN, "--file", model, "--offset", 1)["what"]
    state = torch_load(model)["rng_state"][0]["torch_rng_state"].numpy().tobytes()
    found = locate(capsys, GOLDEN, "--file", model, "--offset", model.read_bytes().index(state) + 9)
    assert found["key"] == "['rng_state'][0]['torch_rng_state']" and "no part" in found["what"]


def test_padding_is_told_from_parameters(capsys):
    source = PADDED
    live = json.loads((source / "truth/rank0.json").read_text())["chunks"][0]
    file = source / "iter_0000002/mp_rank_00_000/distrib_optim.pt"
    saved = torch.load(file, weights_only=True)
    (states,) = saved[0].values()
    data, checked = file.read_bytes(), 0
    for number, (start, end) in enumerate(live["bucket_indices"]):
        used, numel = live["unpadded"][number], end - start
        first = data.index(states["exp_avg"][number].numpy().tobytes())
        for at in range(used, numel):
            found = locate(capsys, source, "--file", file, "--offset", first + 4 * at)
            assert (
                found["elements"] == []
                and found["what"].startswith("padding")
                and found["element"] == at
            )
            checked += 1
        assert locate(capsys, source, "--file", file, "--offset", first + 4 * used - 1)["elements"]
    assert checked > 5


def test_a_hard_link_is_the_same_file(tmp_path, capsys):
    source = PADDED
    out = tmp_path / "out"
    assert (
        main(["convert", str(source), str(out), "--to", "mindspore", "--generate-all-dp-cp"]) == 0
    )
    (found,) = locate(capsys, out, "layers.0.mlp.fc2.weight[3,4]")
    linked = out / "rank_2/network.ckpt"
    back = locate(capsys, out, "--file", linked, "--offset", found["offset"])
    assert back["elements"] == [found]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("layers.0.mlp.fc2.weight[64,0]", "out of range"),
        ("layers.0.mlp.fc2.weight[0,0,0]", "3 indices"),
        ("layers.0.mlp.fc2.weight[a]", "no index"),
        ("layers.0.mlp.fc2.weight[4:4]", "out of range"),
        ("layers.0.mlp.fc3.weight", "perhaps layers.0.mlp.fc"),
        ("layers.0.mlp.fc2.weight]", "NAME[index"),
    ],
)
def test_wrong_queries_are_refused(query, said, capsys):
    assert main(["locate", str(GOLDEN), query]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_wrong_flags_are_refused(capsys):
    for flags in (
        (),
        ("x[0]", "--file", "a"),
        ("--file", "a"),
        ("--file", "nowhere.pt", "--offset", "3"),
        ("layers.0.mlp.fc2.weight", "--tp", "5"),
        (
            "--file",
            str(GOLDEN / "iter_0000002/mp_rank_00_000/distrib_optim.pt"),
            "--offset",
            "999999999",
        ),
    ):
        assert main(["locate", str(GOLDEN), *flags]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_text_for_people(capsys):
    assert (
        main(["locate", str(GOLDEN), "exp_avg.layers.1.attention.out.weight[:, 3]", "--limit", "2"])
        == 0
    )
    out = capsys.readouterr().out
    assert out.count("\n") == 3 and "62 more ranges" in out and "['exp_avg']" in out
