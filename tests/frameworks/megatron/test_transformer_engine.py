"""Models of Transformer Engine's layers, as Megatron-LM's own runs saved them: names and order of
what is made anew are theirs, extra states are no weights, and experts are cut as their names
say."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from parammap.cli.main import main
from tests.support import paths
from tests.support.conversions import convert, digests
from tests.support.torch_load import torch_load

DATA = paths.TESTS / "data/megatron"
GPT, LLAMA, MOE = "core_r0.16.0_te_gpt", "core_r0.16.0_te_llama_tp2", "core_r0.16.0_te_moe_ep2"
ITERATION = "iter_0000002"
LOCAL = ("--transformer-impl", "local")


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    """The folder of all three; to be read only."""
    folder = tmp_path_factory.mktemp("goldens")
    for name in (GPT, LLAMA, MOE):
        with tarfile.open(DATA / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    return folder


def models(save: Path) -> dict[str, dict]:
    """By rank, the model's state dict."""
    return {
        path.parent.name: torch_load(path)["model"]
        for path in sorted(save.glob("*/*/model_optim_rng.pt"))
    }


def tensors(model: dict) -> dict[str, torch.Tensor]:
    return {
        name: value
        for name, value in model.items()
        if value is not None and not name.endswith("_extra_state")
    }


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [
        name
        for name in ours
        if ours[name].dtype != theirs[name].dtype or not ours[name].equal(theirs[name])
    ] == []


def dropped(out: Path) -> list[str]:
    return json.loads((out / "parammap_manifest.json").read_text())["dropped"]


def extra_states(save: Path) -> set[str]:
    """What should be named of those of a run in 8-bit precision."""
    return {
        f"{name} of tp{int(rank[8:10])} pp0 vpp0 ep0"
        for rank, model in models(save).items()
        for name in model
        if name.endswith("_extra_state") and model[name] is not None
    }


# ---------------------------------------------------------------------------------------------------
# names and order


@pytest.mark.parametrize(("name", "sizes"), [(GPT, ()), (LLAMA, ("--tp", "2"))])
def test_what_comes_from_transformers_has_the_names_of_a_run(golden, tmp_path, name, sizes):
    """Keys of extra states too: Megatron-LM loads strictly with them; else it loads loosely, and no
    norm at all."""
    hf = convert(golden / name, tmp_path / "hf", "transformers", "--weights-only")
    out = convert(hf, tmp_path / "out", "megatron", *sizes, "--make-vocab-size-divisible-by", "16")
    theirs, ours = models(golden / name), models(out)
    assert ours.keys() == theirs.keys()
    for rank, model in theirs.items():
        asked = {
            key for key, value in model.items() if value is not None
        }  # Megatron-LM's own layers do without theirs
        assert (
            ours[rank].keys() == asked
            and "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in asked
        )
        assert_same(tensors(ours[rank]), tensors(model))


def test_an_optimizer_that_comes_from_deepspeed_lies_as_a_run_s(golden, tmp_path):
    universal = convert(golden / GPT, tmp_path / "universal", "deepspeed")
    out = convert(universal, tmp_path / "out", "megatron", "--make-vocab-size-divisible-by", "16")
    ours, theirs = (
        json.loads((save / ITERATION / "param_map/layout_tp00_pp000.json").read_text())[
            "optimizers"
        ]
        for save in (out, golden / GPT)
    )
    assert [list(slots(one)) for one in ours] == [list(slots(one)) for one in theirs] != [[]]
    buckets, saved = (
        dict(flat(torch_load(save / ITERATION / "mp_rank_00/distrib_optim.pt")))
        for save in (out, golden / GPT)
    )
    assert buckets.keys() == saved.keys() and len(buckets) == 3
    for name, start, end in slots(theirs[0]):  # nothing is said of what lies between
        assert all(buckets[key][start:end].equal(saved[key][start:end]) for key in buckets), name


def slots(optimizer: dict) -> Iterator[tuple[str, int, int]]:
    return (
        (one["name"], one["start"], one["end"])
        for buffer in optimizer["buffers"]
        for one in buffer["params"]
    )


def flat(tree: dict, path: tuple = ()) -> Iterator[tuple[tuple, torch.Tensor]]:
    for key, value in tree.items():
        if isinstance(value, torch.Tensor):
            yield (*path, key), value
        elif isinstance(value, dict):
            yield from flat(value, (*path, key))


def test_local_layers_are_there_for_the_asking(golden, tmp_path, capsys):
    hf = convert(golden / GPT, tmp_path / "hf", "transformers")
    capsys.readouterr()
    for flags, word in (
        ((), "transformer_engine, which"),
        (LOCAL, "local --no-persist-layer-norm, which"),
    ):
        out = convert(hf, tmp_path / word.split(",")[0], "megatron", *flags)
        assert (
            f"--use-checkpoint-args --transformer-impl {word} takes all else"
            in capsys.readouterr().out
        )
        (model,) = models(out).values()
        args = torch_load(out / "release/mp_rank_00/model_optim_rng.pt")["args"]
        assert args.transformer_impl == word.split()[0].strip(",")
        assert ("decoder.layers.1.input_layernorm.weight" in model) == (flags == LOCAL)
        assert any(name.endswith("_extra_state") for name in model) == (flags == ())


@pytest.mark.parametrize("to", ["megatron", "megatron-dist", "mindspore"])
def test_the_flag_does_not_overrule_what_is_recorded(golden, tmp_path, capsys, to):
    assert main(["convert", str(golden / LLAMA), str(tmp_path / "out"), "--to", to, *LOCAL]) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(
            "was trained with --transformer-impl transformer_engine and not local; leave the flag "
            "out"
        )
    )
    assert convert(golden / LLAMA, tmp_path / "out", to, "--transformer-impl", "transformer_engine")


# -------------------------------------------------------------------------------------------------------
# extra states


@pytest.mark.parametrize("name", [GPT, LLAMA])
def test_they_stay_where_the_layout_does(golden, tmp_path, name):
    """Empty ones (GPT) and those of 8-bit training (LLaMA), on the straight way and by way of
    MindSpore."""
    straight = convert(golden / name, tmp_path / "straight", "megatron")
    there = convert(golden / name, tmp_path / "there", "mindspore")
    for out in (straight, convert(there, tmp_path / "back", "megatron")):
        assert dropped(out) == []
        for rank, model in models(golden / name).items():
            ours = models(out)[rank]
            assert ours.keys() == model.keys()
            assert_same(
                *(
                    {key: value for key, value in one.items() if value is not None}
                    for one in (ours, model)
                )
            )


@pytest.mark.parametrize(
    ("to", "flags"),
    [
        ("megatron", ("--tp", "1")),
        ("megatron-dist", ()),
        ("transformers", ()),
        ("mindspore", ("--tp", "1")),
    ],
)
def test_they_are_no_weights_and_are_named_where_they_stay_behind(
    golden, tmp_path, capsys, to, flags
):
    source = golden / LLAMA
    named = extra_states(source)
    assert len(named) == 2 * (2 * 5 + 1)
    out = convert(source, tmp_path / "out", to, *flags)
    assert "left out: decoder.final_layernorm._extra_state of tp{0-1}" in capsys.readouterr().out
    assert {name for name in dropped(out) if "_extra_state" in name} == named
    assert digests(out).keys() <= digests(source).keys()
    empty = convert(golden / GPT, tmp_path / "empty", to)
    assert not [name for name in dropped(empty) if "_extra_state" in name]


def test_proofs_know_them(golden, tmp_path, capsys):
    for name in (GPT, LLAMA):
        one = convert(golden / name, tmp_path / name / "one", "megatron")
        other = convert(
            golden / name, tmp_path / name / "other", "megatron", "--dp", "2", "--pp", "2"
        )
        for command in (
            ("digest", one),
            ("diff", one, other),
            ("verify", one),
            ("verify", other, "--against", golden / name),
        ):
            assert main([*map(str, command)]) == 0, command
    told = capsys.readouterr()
    assert "_extra_state" not in told.out.partition("left out")[0] and "no problems" in told.out


def test_in_format_torch_dist_they_go_along(golden, tmp_path):
    """Also a mixture's, but for experts' in the torch format, where those of a rank have one in
    common."""
    out = convert(golden / MOE, tmp_path / "out", "megatron-dist")
    theirs, ours = objects(golden / MOE), objects(out)
    filled = {
        key for key, value in theirs.items() if isinstance(value, torch.Tensor) and value.numel()
    }
    assert len(filled) >= 7 and all(
        ours[key].equal(theirs[key]) for key in filled if "experts" not in key
    )
    assert {key for key in filled if "experts" in key} <= set(dropped(out))
    cut = convert(golden / MOE, tmp_path / "cut", "megatron")
    assert {
        "decoder.layers.1.self_attention.linear_qkv._extra_state of tp0 pp0 vpp0 ep0",
        *(key for key in filled if "experts" in key),
    } <= set(dropped(cut))


def objects(save: Path) -> dict[str, object]:
    """The extra states of a torch_dist checkpoint, as torch loads them."""
    reader = dcp.FileSystemReader(save / ITERATION)
    state = {
        key: None for key in reader.read_metadata().state_dict_metadata if "_extra_state/" in key
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {key: value[0] for key, value in state.items()}


# ------------------------------------------------------------------------------------------------------------
# experts


def test_weights_alone_have_the_names_of_the_run_s_own_experts(golden, tmp_path):
    """By the recorded arguments; with the optimizer, they are those of the sidecar."""
    saves = (
        convert(golden / MOE, tmp_path / "whole", "megatron", "--ep", "1"),
        convert(golden / MOE, tmp_path / "weights", "megatron", "--ep", "1", "--weights-only"),
    )
    whole, weights = (models(save)["mp_rank_00"] for save in saves)
    assert_same(tensors(weights), tensors(whole))
    assert (
        weights.keys() == whole.keys()
        and "decoder.layers.1.mlp.experts.linear_fc2.weight3" in weights
    )
    keys = {name.rpartition(".")[0] for name in weights if name.endswith("_extra_state")}
    assert {f"decoder.layers.{i}.mlp.experts.linear_fc{k}" for i in (0, 1) for k in (1, 2)} < keys
    assert not [key for key in keys if "local_experts" in key or "router" in key]


@pytest.mark.parametrize(
    "sizes", [("--ep", "1"), ("--ep", "4", "--dp", "4"), ("--tp", "2"), ("--ep", "1", "--tp", "2")]
)
def test_experts_that_core_016_marks_as_rows_are_cut_by_the_table(golden, tmp_path, sizes):
    out = convert(golden / MOE, tmp_path / "out", "megatron", *sizes)
    assert digests(out) == digests(golden / MOE)
    reader = dcp.FileSystemReader(golden / MOE / ITERATION)
    key = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    state = {
        key: torch.empty(reader.read_metadata().state_dict_metadata[key].size, dtype=torch.bfloat16)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    model = models(out)["mp_rank_00" if "--ep" in sizes and "1" in sizes else "mp_rank_00_000"]
    whole = state[key][1, 0]
    if "--tp" in sizes:
        whole = whole[:, : whole.shape[1] // 2]
    assert model["decoder.layers.1.mlp.experts.linear_fc2.weight0"].equal(whole)
