"""Metaseq checkpoints, written: loaded by fairscale's own FSDP, beside what metaseq's tools make
where they are right."""

import json
import re
from pathlib import Path

import pytest
import torch

from convert.reshard_fsdp import main as reshard_fsdp
from convert.reshard_mp import main as reshard_mp
from parammap.cli.metaseq_scripts import convert_into
from parammap.errors import RefusedError
from parammap.formats.pickles import Global, Opaque
from parammap.frameworks.metaseq.reshard import with_parts
from parammap.job.request import Request
from tests.support.metaseq_runs import ROOT, run_lab
from tests.support.torch_load import torch_load

DATA = ROOT / "tests/data/metaseq"
FP16, FP32 = DATA / "mp2dp2_fp16", DATA / "mp1dp3_fp32"
SHARDS = "checkpoint_3-model_part-{part}-shard{shard}.pt"
HEAD = "decoder.output_projection.weight"

#: options of tests/support/fsdp.py
SOURCES = {
    "nested_fp16": {"parts": 2, "shards": 3, "dtype": "float16"},
    "unnested": {"parts": 2, "shards": 2, "nested": False},
    "empty_root_bf16": {"shards": 2, "empty_root": True, "dtype": "bfloat16"},
    "unflattened": {"parts": 2, "shards": 3, "flatten": False, "tied": False},
    "unflattened_tied": {"shards": 2, "flatten": False, "layers": 1},
    "sinusoidal": {"parts": 2, "sinusoidal": True},
}
#: source, parts, shards
CASES = [
    ("nested_fp16", 2, 1),
    ("nested_fp16", 2, 5),
    ("nested_fp16", 1, 2),
    ("nested_fp16", 4, 3),
    ("unnested", 2, 3),
    ("unnested", 1, 1),
    ("empty_root_bf16", 1, 7),
    ("empty_root_bf16", 2, 1),
    ("unflattened", 2, 2),
    ("unflattened", 4, 5),
    ("unflattened_tied", 1, 3),
    ("sinusoidal", 1, 5),
]
#: how a tensor is cut over parts: rows, columns, or the rows of each of three
CUT = [
    (r"qkv_proj", "thirds"),
    (r"embed_tokens|output_projection|fc1", 0),
    (r"(fc2|out_proj)\.weight", 1),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a checkpoint by fairscale's FSDP for each source; to be read only."""
    folder = tmp_path_factory.mktemp("fsdp")
    run_lab(
        "fsdp", folder, [{"folder": str(folder / name), **given} for name, given in SOURCES.items()]
    )
    return folder


@pytest.fixture(scope="module")
def loaded(written, tmp_path_factory):
    """A folder with each case's shards as we write them, and what fairscale's FSDP holds after it
    loaded them."""
    folder, options = tmp_path_factory.mktemp("loaded"), []
    for name, parts, shards in CASES:
        out = folder / f"{name}_{parts}_{shards}"
        assert reshard(written / name, out, parts, shards) == 0
        options.append({"folder": str(out), **SOURCES[name], "parts": parts, "shards": shards})
    run_lab("fsdp_load", folder, options)
    return folder


def reshard(source: Path, out: Path, parts: int, shards: int, *flags: str) -> int:
    return reshard_mp(
        [
            "--input",
            f"{source}/checkpoint_3-*.pt",
            "--output",
            f"{out}/{SHARDS}",
            "--num-output-parts",
            str(parts),
            "--target-ddp-size",
            str(shards),
            *flags,
        ]
    )


def shards_of(folder: Path, parts: int, shards: int) -> dict[tuple[int, int], dict]:
    return {
        (part, shard): torch_load(folder / SHARDS.format(part=part, shard=shard))
        for part in range(parts)
        for shard in range(shards)
    }


def rule(name: str):
    return next((how for pattern, how in CUT if re.search(pattern, name)), None)


def glued(tensors: list[torch.Tensor], name: str) -> torch.Tensor:
    how = rule(name)
    if how == "thirds":
        return torch.cat(
            [torch.cat(thirds) for thirds in zip(*(t.chunk(3) for t in tensors), strict=True)]
        )
    return tensors[0] if how is None else torch.cat(tensors, how)


def cut(tensor: torch.Tensor, name: str, parts: int, part: int) -> torch.Tensor:
    how = rule(name)
    if how == "thirds":
        return torch.cat([third.chunk(parts)[part] for third in tensor.chunk(3)])
    return tensor if how is None else tensor.chunk(parts, how)[part]


def truth_of(folder: Path, there: int, parts: int, part: int) -> dict[str, dict[str, torch.Tensor]]:
    """What FSDP said of a source, as it should be in part `part` of `parts`."""
    own = [torch_load(folder / f"truth/part{number}.pt") for number in range(there)]
    return {
        role: {
            name: cut(glued([one[role][name] for one in own], name), name, parts, part)
            for name in tensors
        }
        for role, tensors in own[0].items()
    }


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(bits(tensor), bits(other)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize(("name", "parts", "shards"), CASES)
def test_fairscale_loads_what_it_would_have_saved(name, parts, shards, loaded, written):
    for part in range(parts):
        here = torch_load(loaded / f"{name}_{parts}_{shards}/loaded/part{part}.pt")
        there = truth_of(written / name, SOURCES[name].get("parts", 1), parts, part)
        assert here.keys() == there.keys() == {"weight", "exp_avg", "exp_avg_sq"}
        for role in here:
            assert len(here[role]) > 16
            assert_same(here[role], there[role])


def test_shards_of_padding_only_are_zeros(loaded):
    folder, key = loaded / "empty_root_bf16_1_7", "decoder.layer_norm.flat_param_0"
    last = shards_of(folder, 1, 7)[0, 6]
    (entry,) = (
        entry
        for entry in last["shard_metadata"]["param_metadata"]
        if entry["fsdp_path"] == "decoder.layer_norm"
    )
    assert entry["params"]["flat_param_0"]["padding"] == 4  # 24 elements are six chunks of 4
    sidecar = json.loads(
        (folder / "param_map/layout_checkpoint_3-model_part-0-shard6.json").read_text()
    )
    (number,) = (int(number) for number, name in sidecar["optimizer_index"].items() if name == key)
    states = last["last_optimizer_state"]["state"][number]
    for tensor in (last["model"][key], states["exp_avg"], states["exp_avg_sq"]):
        assert tensor.shape == (4,) and not bits(tensor).any()


def test_there_and_back_is_the_same(written, tmp_path):
    assert reshard(written / "nested_fp16", tmp_path / "there", 4, 5) == 0
    assert reshard(tmp_path / "there", tmp_path / "back", 2, 3) == 0
    before, after = (
        shards_of(folder, 2, 3) for folder in (written / "nested_fp16", tmp_path / "back")
    )
    for at, content in before.items():
        assert_same(content["model"], after[at]["model"])
        assert content["shard_metadata"] == after[at]["shard_metadata"]
        for number, states in content["last_optimizer_state"]["state"].items():
            again = after[at]["last_optimizer_state"]["state"][number]
            assert states.keys() == again.keys() and states["step"] == again["step"]
            assert_same(
                {role: states[role] for role in ("exp_avg", "exp_avg_sq")},
                {role: again[role] for role in ("exp_avg", "exp_avg_sq")},
            )
        for key in ("param_groups", "loss_scale"):
            assert content["last_optimizer_state"][key] == after[at]["last_optimizer_state"][key]
        rest = content.keys() - {"model", "last_optimizer_state", "cfg"}
        assert {key: content[key] for key in rest} == {key: after[at][key] for key in rest}
        assert content.keys() == after[at].keys()


@pytest.mark.parametrize("name", SOURCES)
def test_whole_tensors_are_fsdps_own(name, written, tmp_path):
    parts = SOURCES[name].get("parts", 1)
    assert (
        reshard_fsdp(
            [
                "--input",
                f"{written / name}/*.pt",
                "--output",
                f"{tmp_path}/out/part{{part}}.pt",
                "--skip-optimizer-state",
            ]
        )
        == 0
    )
    for part in range(parts):
        model = torch_load(tmp_path / f"out/part{part}.pt")["model"]
        truth = torch_load(written / name / f"truth/part{part}.pt")
        assert_same(
            {name: tensor for name, tensor in model.items() if name != HEAD},
            {name: tensor for name, tensor in truth["weight"].items() if name != HEAD},
        )
        assert (HEAD in model) == (not SOURCES[name].get("empty_root"))


def test_metaseqs_own_checkpoint_cut_as_its_tool_cuts_it(tmp_path):
    """Every key and value of every file, where reshard_fsdp's are right: its input has no padding,
    or it keeps its place."""
    for source, parts, shards in ((FP16, 2, 3), (FP32, 1, 5)):
        out = tmp_path / source.name
        assert (
            reshard_fsdp(
                [
                    "--input",
                    f"{source}/checkpoint_3-*.pt",
                    "--output",
                    f"{out}/{SHARDS}",
                    "--num-output-shards",
                    str(shards),
                ]
            )
            == 0
        )
        theirs = shards_of(source / f"up/rf_n{shards}", parts, shards)
        for at, ours in shards_of(out, parts, shards).items():
            assert_equal(ours, theirs[at])


def assert_equal(ours, theirs, where="") -> None:
    if torch.is_tensor(ours):
        assert_same({where: ours}, {where: theirs})
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key, value in ours.items():
            assert_equal(value, theirs[key], f"{where}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert type(ours) is type(theirs) and len(ours) == len(theirs), where
        for number, value in enumerate(ours):
            assert_equal(value, theirs[number], f"{where}/{number}")
    elif hasattr(ours, "__dict__"):
        assert_equal(vars(ours), vars(theirs), where)
    else:
        assert (type(ours), ours) == (type(theirs), theirs), where


@pytest.mark.parametrize("parts", [1, 4])
def test_parts_are_those_of_metaseqs_tool(parts, tmp_path):
    assert (
        reshard_mp(
            [
                "--input",
                f"{FP16}/up/rf1/*.pt",
                "--output",
                f"{tmp_path}/out/reshard-model_part-{{i}}.pt",
                "--num-output-parts",
                str(parts),
            ]
        )
        == 0
    )
    for part in range(parts):
        ours, theirs = (
            torch_load(folder / f"reshard-model_part-{part}.pt")
            for folder in (tmp_path / "out", FP16 / f"up/rm{parts}")
        )
        assert torch.equal(ours["model"].pop(HEAD), ours["model"]["decoder.embed_tokens.weight"])
        assert_same(ours["model"], theirs["model"])
        entry = ours["shard_metadata"]["param_metadata"][1]["params"]["flat_param_0"]
        assert entry["numels"] == [
            tensor.numel() for name, tensor in ours["model"].items() if ".layers.0." in name
        ]
        assert [cfg["common"]["model_parallel_size"] for cfg in (ours["cfg"], theirs["cfg"])] == [
            parts,
            2,
        ]
        assert ours["cfg"]["model"].model_parallel_size == parts


def test_a_singleton_becomes_shards_as_metaseq_wraps_them(tmp_path):
    """A file without metadata: root and layers, as the run that wrote the parts had them."""
    assert (
        reshard_mp(
            [
                "--input",
                f"{FP16}/up/stitched.pt",
                "--output",
                f"{tmp_path}/out/{SHARDS}",
                "--num-output-parts",
                "2",
                "--target-ddp-size",
                "2",
            ]
        )
        == 0
    )
    theirs = shards_of(FP16, 2, 2)
    for at, ours in shards_of(tmp_path / "out", 2, 2).items():
        assert_same(ours["model"], theirs[at]["model"])
        assert ours["shard_metadata"] == theirs[at]["shard_metadata"]


def test_sidecars_say_what_the_patch_would_have_written(tmp_path):
    assert reshard(FP16, tmp_path / "out", 2, 2) == 0
    for part in range(2):
        for shard in range(2):
            stem = f"checkpoint_3-model_part-{part}-shard{shard}"
            ours = json.loads((tmp_path / f"out/param_map/layout_{stem}.json").read_text())
            theirs = json.loads((FP16 / f"param_map/param_map_{stem}.json").read_text())
            for content in (ours, theirs):
                for key in ("format", "schema", "version", "framework"):
                    content.pop(key, None)
            assert ours == theirs
            assert (tmp_path / f"out/param_map/args_{stem}.json").exists() == (shard == 0)
    settings = json.loads(
        (tmp_path / "out/param_map/args_checkpoint_3-model_part-1-shard0.json").read_text()
    )["cfg"]
    assert (
        settings["model"]["decoder_attention_heads"],
        settings["common"]["model_parallel_size"],
    ) == (4, 2)


def test_only_weights_are_cast(written, tmp_path):
    assert reshard(written / "unnested", tmp_path / "out", 2, 2, "--output-dtype", "fp16") == 0
    for part in range(2):
        for shard in range(2):
            before, after = (
                torch_load(folder / SHARDS.format(part=part, shard=shard))
                for folder in (written / "unnested", tmp_path / "out")
            )
            assert_same(
                {name: tensor.half() for name, tensor in before["model"].items()}, after["model"]
            )
            assert_same(
                before["last_optimizer_state"]["state"][0] | {"step": torch.tensor(0)},
                after["last_optimizer_state"]["state"][0] | {"step": torch.tensor(0)},
            )


@pytest.mark.parametrize("flag", ["fp32", "bf16", "fp16"])
def test_half_precision_is_cast_as_torch_casts_it(flag, tmp_path):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[flag]
    for name, source in (("a", FP16), ("b", tmp_path / "a")):
        assert (
            reshard(
                source, tmp_path / name, 2, 2, "--output-dtype", flag if name == "a" else "fp16"
            )
            == 0
        )
    for at, before in shards_of(FP16, 2, 2).items():
        once, twice = (shards_of(tmp_path / name, 2, 2)[at]["model"] for name in "ab")
        assert_same({name: tensor.to(dtype) for name, tensor in before["model"].items()}, once)
        assert_same(
            {name: tensor.to(dtype).half() for name, tensor in before["model"].items()}, twice
        )


def test_another_number_of_parts_needs_a_number_that_divides_the_heads(tmp_path, capsys):
    assert reshard(FP16, tmp_path / "out", 8, 1) == 2
    assert "4 attention heads cannot be divided over tp 8" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_heads_that_nobody_recorded_may_come_together_and_not_be_cut(written, tmp_path, capsys):
    for path in sorted((written / "nested_fp16").glob("*.pt")):
        content = torch_load(path)
        del content["cfg"]
        (tmp_path / "source").mkdir(exist_ok=True)
        torch.save(content, tmp_path / "source" / path.name)
    assert reshard(tmp_path / "source", tmp_path / "out", 4, 1) == 2
    assert "number of attention heads is not recorded" in capsys.readouterr().err
    assert reshard(tmp_path / "source", tmp_path / "out", 1, 1) == 0


def test_layouts_that_metaseq_does_not_have_are_refused(tmp_path):
    with pytest.raises(RefusedError, match="metaseq has no pp and no ep"):
        convert_into(
            Request(source=FP16, target=tmp_path / "out", to="metaseq", sizes={"pp": 2, "ep": 2})
        )
    with pytest.raises(
        RefusedError, match="is a model of the gpt2 family, and metaseq has opt only"
    ):
        convert_into(
            Request(
                source=DATA.parent / "megatron/core_r0.12.0_repo_mcore_tp2pp2_hook",
                weights_only=True,
                target=tmp_path / "out",
                to="metaseq",
            )
        )
    assert not list(tmp_path.iterdir())


def test_files_of_one_name_are_refused(tmp_path, capsys):
    assert (
        reshard_fsdp(["--input", f"{FP16}/checkpoint_3-*.pt", "--output", f"{tmp_path}/out/all.pt"])
        == 2
    )
    assert "several files" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_request_without_a_name_uses_metaseqs_own(tmp_path):
    report = convert_into(
        Request(source=FP16, target=tmp_path / "out", to="metaseq", sizes={"dp": 1})
    )
    assert report.status == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.pt")) == [
        f"checkpoint_3-model_part-{part}-shard0.pt" for part in range(2)
    ]


def test_the_number_of_parts_in_omegaconfs_records():
    node = Opaque(
        Global("omegaconf.nodes", "AnyNode"), (), new=True, state={"_val": 8, "_parent": None}
    )
    cfg = Opaque(
        Global("omegaconf.dictconfig", "DictConfig"),
        (),
        new=True,
        state={"_content": {"model_parallel_size": node}},
    )
    node.state["_parent"] = cfg
    changed = with_parts({"common": cfg}, 2)["common"].state["_content"]["model_parallel_size"]
    assert changed.state["_val"] == 2 and changed.state["_parent"].target.name == "DictConfig"
    assert node.state["_val"] == 8
