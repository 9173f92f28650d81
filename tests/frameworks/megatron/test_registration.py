"""Buckets are filled in the order in which the model registers its parameters, whatever order a
file's keys have."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.tiny.trained import Trained
from parammap.checkpoint import sidecar as sidecars
from parammap.cli.main import main
from parammap.errors import RefusedError
from parammap.frameworks import registry
from parammap.frameworks.megatron import readback, registration
from parammap.frameworks.megatron.reshard import resharded
from parammap.frameworks.megatron.structure import leaves, structures_from_slots
from parammap.job import conversion
from parammap.job.request import Request
from parammap.tensors.layout import TargetLayout
from parammap.tensors.logical import TensorSpec
from tests.support import paths
from tests.support.runs import every_run

#: written by the converter of commit 7ecdb89, see tests/data/README.md
WRONG = paths.TESTS / "data/megatron/torch_dist_in_order_of_keys"
ONE_BUCKET = {"bucket": 10**8}
SMALL = {"hidden": 64, "heads": 4, **ONE_BUCKET}
LLAMA = {
    **SMALL,
    "layers": 2,
    "rmsnorm": True,
    "swiglu": True,
    "gqa": 2,
    "untie": True,
    "no_bias": True,
    "rope": True,
}
EXPERTS = {**SMALL, "layers": 2, "experts": 4, "swiglu": True, "no_bias": True}
#: options of runs whose states are spread over data-parallel ranks, and how format torch_dist
#: shards their optimizer
RUNS = {
    "gpt-dp4": ({**SMALL, "layers": 2, "dp": 4}, "dp_reshardable"),
    "gpt-pp2dp2": ({**SMALL, "layers": 4, "pp": 2, "dp": 2, "untie": True}, "fully_reshardable"),
    "llama-dp2": ({**LLAMA, "dp": 2}, "dp_reshardable"),
    "llama-tp2dp2": ({**LLAMA, "tp": 2, "dp": 2}, "fully_reshardable"),
    "experts-ep2": ({**EXPERTS, "dp": 2, "ep": 2}, "dp_reshardable"),
}
QUICK = ("gpt-dp4", "experts-ep2")


def every_parallel_save() -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name",
        [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.full]) for name in RUNS],
    )


@pytest.fixture
def saves(trained):
    """saves(name): the same training, saved in format torch_dist and in format torch."""

    def run(name: str) -> tuple[Trained, Trained]:
        options, sharding = RUNS[name]
        return trained(**options, ckpt_format="torch_dist", dist_optim=sharding), trained(**options)

    return run


def convert(source: Path, target: Path, to: str = "megatron", **options) -> Path:
    assert conversion.convert(Request(source=source, target=target, to=to, **options)).status == 0
    return target


def assert_same_optimizer(written: Path, saved: Path) -> None:
    """Each rank's distrib_optim.pt holds the same buckets, but for gaps, and each model file the
    same keys in that order."""
    files = sorted(saved.glob("iter_*/mp_rank_*/distrib_optim.pt"))
    assert files
    for file in files:
        model_copy = written / file.relative_to(saved)
        assert _buckets(model_copy, written) == _buckets(file, saved)
        models = [
            torch.load(one.with_name("model_optim_rng.pt"), weights_only=False)["model"]
            for one in (model_copy, file)
        ]
        mine, theirs = (
            [key for key, value in model.items() if torch.is_tensor(value)] for model in models
        )
        assert mine == theirs


def _buckets(file: Path, root: Path) -> list[tuple[str, str, bytes]]:
    """(name, state, bytes) of each parameter in the order of the buffers, by the sidecar of the
    real save, or of our own."""
    content = torch.load(file, weights_only=False)
    rank = file.parent.name.removeprefix("mp_rank_").split("_")
    layouts = sorted(root.glob("param_map/layout_*.json"))
    layout = json.loads(layouts[0 if len(layouts) == 1 else _number(root, rank)].read_text())
    chain = content if isinstance(content, list) else [content]
    found = []
    for saved, optimizer in zip(chain, layout["optimizers"], strict=True):
        for gbuf, buffer in enumerate(optimizer["buffers"] if optimizer else ()):
            (states,) = saved[gbuf].values()
            for param in buffer["params"]:
                found += [
                    (
                        param["name"],
                        state,
                        states[state][param["start"] : param["end"]].numpy().tobytes(),
                    )
                    for state in ("param", "exp_avg", "exp_avg_sq")
                ]
    return found


def _number(root: Path, rank: list[str]) -> int:
    names = sorted(path.name.removeprefix("mp_rank_") for path in root.glob("iter_*/mp_rank_*"))
    return names.index("_".join(rank))


@every_parallel_save()
def test_what_a_parallel_save_scattered_is_what_megatron_saves_in_torch_format(
    saves, tmp_path, name
):
    scattered, saved = saves(name)
    assert_same_optimizer(convert(scattered.path, tmp_path / "out"), saved.path)


def test_by_way_of_mindspore_too(saves, tmp_path):
    scattered, saved = saves("gpt-dp4")
    between = convert(scattered.path, tmp_path / "between", "mindspore")
    assert_same_optimizer(convert(between, tmp_path / "out"), saved.path)


@every_parallel_save()
def test_buckets_of_another_layout_are_those_of_a_run_in_it(saves, trained, tmp_path, name):
    options, _ = RUNS[name]
    one = dict.fromkeys(("tp", "pp", "ep"), 1)
    written = convert(saves(name)[0].path, tmp_path / "out", sizes={**one, "dp": 1})
    alone = trained(**{key: value for key, value in options.items() if key not in (*one, "dp")})
    assert _order(written) == _order(alone.path)


def _order(root: Path) -> list[list[str]]:
    return [
        [slot.name for slot in buffer.slots]
        for buffer in sidecars.read(root / "param_map").ranks[0, 0, 0].optimizers[0]
    ]


# -------------------------------------------------------------------------------------------------------------
# the rule


@every_run()
def test_the_rule_is_the_order_that_hooks_record(trained_variant, core, variant):
    sidecar = sidecars.read(trained_variant(core, variant).path / "param_map")
    for names in registration.recorded(sidecar):
        assert registration.in_order(sorted(names)) == names


def test_what_is_recorded_comes_before_the_rule():
    """A changed model: another order in its attention, and a module that nobody knows."""
    layer = "decoder.layers.0."
    own = [
        layer + name
        for name in (
            "self_attention.linear_qkv.weight",
            "self_attention.linear_proj.weight",
            "mixer.a",
        )
    ]
    experts = [layer + f"mlp.experts.local_experts.{e}.linear_fc1.weight" for e in (0, 1)]
    first, last = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
    names = {last, *own, *experts, first}
    assert registration.in_order(names, [[first, *own, last], experts[:1], experts[1:]]) in (
        [first, *own, *experts, last],
        [first, *own[:2], *experts, own[2], last],
    )
    assert registration.in_order([*own[1::-1], first]) == [first, own[1], own[0]]


def test_experts_apart_find_their_place_in_a_state_dict_made_of_buffers(saves):
    """Their buffer counts from 0, as that of the dense parameters does."""
    _, saved = saves("experts-ep2")
    sidecar = sidecars.read(saved.path / "param_map")
    model = torch.load(
        saved.iteration_folder / "mp_rank_00_001/model_optim_rng.pt", weights_only=False
    )["model"]
    (tree,) = structures_from_slots(sidecar, (0, 0, 1), 1)
    assert [spec.name for spec in leaves(tree, TensorSpec)] == [
        key for key in model if torch.is_tensor(model[key])
    ]


def test_a_state_dict_in_another_order_than_the_buffers_is_refused(saves):
    source = registry.read(saves("gpt-dp4")[1].path)
    (tree,) = source.structures[0, 0, 0]
    turned = replace(source, structures={(0, 0, 0): [dict(reversed(tree.items()))]})
    with pytest.raises(RefusedError, match="the other way round"):
        resharded(turned, TargetLayout(layout=replace(source.layout, dp=1)))


def test_experts_among_parameters_of_no_known_place_are_refused(saves, monkeypatch):
    source = registry.read(saves("experts-ep2")[0].path)
    place_of = registration.place_of
    monkeypatch.setattr(
        registration, "place_of", lambda name: None if "router" in name else place_of(name)
    )
    resharded(source, TargetLayout(layout=replace(source.trained)))
    with pytest.raises(
        RefusedError, match=r"nobody recorded whether its experts .*mlp.router.weight"
    ):
        resharded(source, TargetLayout(layout=replace(source.trained, ep=1)))


# -------------------------------------------------------------------------------------------------
# earlier wrong outputs


def test_what_was_written_in_the_order_of_keys_is_found_out(tmp_path, capsys):
    assert main(["verify", str(WRONG)]) == 1
    assert "registered before" in capsys.readouterr().out
    again = tmp_path / "again"
    assert main(["convert", str(WRONG), str(again), "--to", "megatron"]) == 2
    assert "an earlier ParamMap made them from a torch_dist checkpoint" in capsys.readouterr().err
    assert not again.exists()


def test_what_went_to_mindspore_does_not_come_back_in_the_order_of_keys(tmp_path, capsys):
    between = convert(WRONG, tmp_path / "between", "mindspore")
    assert main(["verify", str(between)]) == 1
    assert main(["convert", str(between), str(tmp_path / "out"), "--to", "megatron"]) == 2
    assert "convert that checkpoint again" in capsys.readouterr().err


def test_written_buckets_are_read_back_by_the_rule(saves, tmp_path):
    """Two parameters of one size are exchanged in the file."""
    written = convert(saves("gpt-dp4")[1].path, tmp_path / "out", sizes={"dp": 1})
    output = registry.read(written)
    readback.check(written, output)
    file = next(written.glob("iter_*/mp_rank_00/distrib_optim.pt"))
    content = torch.load(file, weights_only=False)
    slots = {slot.name: slot for slot in output.sidecar.ranks[0, 0, 0].optimizers[0][0].slots}
    one, other = (
        slots[f"decoder.layers.0.{name}.weight"]
        for name in ("input_layernorm", "pre_mlp_layernorm")
    )
    (states,) = content[0].values()
    param = states["param"]
    param[one.start : one.end], param[other.start : other.end] = (
        param[other.start : other.end].clone() + 1,
        param[one.start : one.end].clone(),
    )
    torch.save(content, file)
    with pytest.raises(
        RefusedError,
        match=r"distrib_optim.pt: where Megatron-LM will look for \S+norm.weight, element \d",
    ):
        readback.check(written, output)


def test_a_hooks_own_order_is_kept_and_said(saves, tmp_path):
    """A changed model: two parameters of one size stand the other way round, in the sidecar and in
    the state dict."""
    source = shutil.copytree(saves("gpt-dp4")[1].path, tmp_path / "source")
    before, after = (
        f"decoder.layers.1.{name}.weight" for name in ("input_layernorm", "pre_mlp_layernorm")
    )
    swap = {before: after, after: before}
    for file in source.rglob("layout_*.json"):
        layout = json.loads(file.read_text())
        for param in layout["optimizers"][0]["buffers"][0]["params"]:
            param["name"] = swap.get(param["name"], param["name"])
        file.write_text(json.dumps(layout))
    for file in source.rglob("model_optim_rng.pt"):
        content = torch.load(file, weights_only=False)
        content["model"] = {swap.get(key, key): value for key, value in content["model"].items()}
        torch.save(content, file)
    written = convert(source, tmp_path / "out", sizes={"dp": 1})
    layout = json.loads((written / "param_map/layout_tp00_pp000.json").read_text())
    assert layout["parameter_order"] == "recorded"
    assert _order(written) == _order(source)
    assert main(["verify", str(written)]) == 0
