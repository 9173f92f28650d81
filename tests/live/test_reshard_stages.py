"""Stages of any numbers of layers, the embedding or the output alone in one: real megatron-core is
told them and loads them.

A checkpoint in such stages is loaded by the text that its own arguments have for
--pipeline-model-parallel-layout: megatron-core parses it, builds the stages, loads every rank, and
what it then holds is compared bit for bit with the source's live state cut by hand
(examples/tiny/whole.py)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from examples.tiny.trained import Trained, Truth, train_into
from examples.tiny.whole import ROLES, Sizes, cut_for, same
from parammap.cli.main import main
from parammap.frameworks.megatron.reshard.rank_metadata import ARGUMENTS, TargetArguments
from parammap.tensors.layout import Layout
from tests.support.going_on import LOSS, losses, parammap
from tests.support.live import prove
from tests.support.reshards import Wanted, assert_same, digests
from tests.support.reshards import convert as converted
from tests.support.torch_load import torch_load

CORE, STEPS = "0.16.1", 3
SMALL: dict[str, Any] = {"layers": 6, "hidden": 32, "heads": 4, "vocab": 60}
SEVERAL_BUCKETS: dict[str, Any] = {**SMALL, "core": CORE, "bucket": 10_000}
PLAIN: dict[str, Any] = {**SEVERAL_BUCKETS, "plain": True, "dtype": "fp32", "global_batch": 8}

#: what arguments call the stages, and their layers
STAGES = {
    "E|tt|tttt|L": Sizes(pp=4, stage_layers=(0, 2, 4, 0)),
    "Et|ttt|t|tL": Sizes(pp=4, stage_layers=(1, 3, 1, 1)),
    "E|tttttt|L": Sizes(tp=2, pp=3, stage_layers=(0, 6, 0)),
    "Et|tt|tt|tL": Sizes(pp=2, vpp=2, stage_layers=(1, 2, 2, 1)),
    "E|ttt|ttt|L": Sizes(pp=2, vpp=2, stage_layers=(0, 3, 3, 0)),
    "E|tt||ttttL": Sizes(pp=2, vpp=2, stage_layers=(0, 2, 0, 4)),
}
QUICK = ("E|tt|tttt|L", "Et|ttt|t|tL", "Et|tt|tt|tL", "E|tt||ttttL")
ALONE = "E|ttt|ttt|L"

#: releases that cannot be told any stages, and what they say
REFUSED = {
    "0.12.3": {
        "1,3,1,1": "only the first and the last stage may differ",
        "0,3,3,0": "only core 0.13 and later",
        "2,0,2,2": "only core 0.13 and later",
    },
    "0.6.0": {
        "1,3,1,1": "no stage may differ",
        "2,1,1,2": "no stage may differ",
        "0,3,3,0": "only core 0.13 and later",
    },
}
#: of later releases (Megatron-LM, training/arguments.py, core_r0.9.0); the tiny runs of all
#: releases have them
NOT_IN_0_6 = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")


def laid_out(run: Trained, out: Path, sizes: Sizes, framework: str = "megatron") -> Path:
    done = parammap(run.path, out, framework, sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def args_of_ranks(root: Path) -> list[SimpleNamespace]:
    return [
        torch_load(file)["args"]
        for file in sorted(root.glob("iter_*/mp_rank_*/model_optim_rng.pt"))
    ]


def resumed(run: dict[str, Any], checkpoint: Path, out: Path, sizes: Sizes, steps: int) -> Trained:
    """By megatron-core, in the stages that the checkpoint's arguments name."""
    (layout,) = {args.pipeline_model_parallel_layout for args in args_of_ranks(checkpoint)}
    options = sizes._asdict()
    del options["stage_layers"]
    stages = {"stage_layout": layout} if layout else {}
    return train_into(out, {**run, **options, **stages, "steps": steps, "resume": str(checkpoint)})


def assert_holds(run: Trained, expected: Trained) -> None:
    """Every rank, as it was before its first step, bit for bit."""
    loaded = [Truth(file) for file in sorted((run.path / "resumed").glob("tp*.npz"))]
    assert [truth.place for truth in loaded] == [truth.place for truth in expected.truths()]
    for own, theirs in zip(loaded, expected.truths(), strict=True):
        assert own.meta["layers"] == theirs.meta["layers"] and set(own.names()) == set(
            theirs.names()
        )
        assert own.meta["scheduler"] == theirs.meta["scheduler"]
        assert not [
            (*key, role)
            for key in own.names()
            for role in ROLES
            if not same(own.array(*key, role), theirs.array(*key, role))
        ]


@pytest.mark.parametrize(
    "text",
    [pytest.param(text, marks=[] if text in QUICK else [pytest.mark.full]) for text in STAGES],
)
def test_megatron_loads_the_live_state_in_any_stages(trained, tmp_path, text):
    sizes, source = STAGES[text], trained(**PLAIN, pp=2, steps=STEPS)
    checkpoint = laid_out(source, tmp_path / "relaid", sizes)
    assert {args.pipeline_model_parallel_layout for args in args_of_ranks(checkpoint)} == {text}
    run = resumed(PLAIN, checkpoint, tmp_path / "resumed", sizes, STEPS + 1)
    assert_holds(run, cut_for(source, sizes, tmp_path / "expected"))
    before, after = (
        losses(source, "evaluated"),
        losses(trained(**PLAIN, pp=2, steps=STEPS + 1), "evaluated"),
    )
    assert (
        before.std() > 0.01
        and abs(losses(run, "evaluated", "resumed") - before).max() < LOSS["fp32"]
    )
    assert abs(losses(run, "evaluated") - after).max() < LOSS["fp32"]


def test_megatron_loads_what_stood_alone(trained, tmp_path):
    """And what said how the stages were is gone."""
    source, sizes = trained(**SEVERAL_BUCKETS, pp=4, stage_layout=ALONE, steps=STEPS), Sizes(tp=2)
    checkpoint = laid_out(source, tmp_path / "relaid", sizes)
    run = resumed(SEVERAL_BUCKETS, checkpoint, tmp_path / "resumed", sizes, STEPS)
    assert run.truths()[0].meta["args"]["pipeline_model_parallel_layout"] is None
    assert_holds(run, cut_for(source, sizes, tmp_path / "expected"))


def test_there_and_back_from_stages_that_stand_alone(trained, tmp_path):
    """Bit for bit, arguments and sidecar too; no two elements of a role are equal. MindSpore gets
    the same tensors."""
    source, other = (
        trained(**SEVERAL_BUCKETS, pp=4, stage_layout=ALONE, steps=STEPS),
        Wanted({"tp": 2, "pp": 1}, (), 16),
    )
    there = converted(source.path, tmp_path / "b", other)
    assert digests(there) == digests(converted(source.path, tmp_path / "ms", other, "mindspore"))
    prove(cut_for(source, Sizes(tp=2), tmp_path / "expected"), tmp_path / "ms")
    back = converted(tmp_path / "b", tmp_path / "a", Wanted({"tp": 1, "pp": 4}, (0, 3, 3, 0), 16))
    assert assert_same(tmp_path / "a", source, lost_ranks=True) > 50_000
    assert digests(there) == digests(back) and len(digests(there)) > 60


@pytest.mark.full
def test_a_source_of_which_a_stage_holds_nothing(trained, tmp_path):
    """megatron-core trains it; it is read, though never written."""
    source = trained(**SEVERAL_BUCKETS, pp=4, stage_layout="E||tttttt|L")
    prove(
        cut_for(source, Sizes(tp=2), tmp_path / "expected"),
        laid_out(source, tmp_path / "ms", Sizes(tp=2), "mindspore"),
    )


def test_stages_stay_where_only_tp_changes(trained, tmp_path):
    source = trained(**SEVERAL_BUCKETS, pp=4, stage_layout=ALONE, steps=STEPS)
    converted(source.path, tmp_path / "b", Wanted({"tp": 2}, (), 16))
    assert {args.pipeline_model_parallel_layout for args in args_of_ranks(tmp_path / "b")} == {
        ALONE
    }


@pytest.fixture
def earlier(trained: Callable[..., Trained], tmp_path: Path) -> Callable[[str], Path]:
    """earlier(core): a copy of a run of pp 2, with those arguments of stages only that the release
    has."""

    def run(core: str) -> Path:
        source = Path(shutil.copytree(trained(**SMALL, core=core, pp=2).path, tmp_path / "source"))
        for file in source.rglob("model_optim_rng.pt") if core == "0.6.0" else ():
            content = torch_load(file)
            for name in NOT_IN_0_6:
                delattr(content["args"], name)
            torch.save(content, file)
        return source

    return run


def command(source: Path, layers: str) -> list[str]:
    return [
        "convert",
        str(source),
        str(source.parent / "out"),
        "--to",
        "megatron",
        "--pp",
        "4",
        "--stage-layers",
        layers,
    ]


@pytest.mark.parametrize(
    ("core", "layers"), [(core, layers) for core, cases in REFUSED.items() for layers in cases]
)
def test_stages_that_the_release_cannot_be_told(earlier, capsys, core, layers):
    source = earlier(core)
    assert main(command(source, layers)) == 2
    error = capsys.readouterr().err
    assert REFUSED[core][layers] in error and error.count("\n") == 1
    assert [path.name for path in source.parent.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("layers", "said"), [("2,1,1,2", (2, 2)), ("1,2,2,1", (1, 1)), ("3,1,1,1", (3, 1))]
)
def test_first_and_last_stage_are_told_to_earlier_releases(earlier, layers, said):
    source = earlier("0.12.3")
    assert main(command(source, layers)) == 0
    for args in args_of_ranks(source.parent / "out"):
        assert (
            args.decoder_first_pipeline_num_layers,
            args.decoder_last_pipeline_num_layers,
        ) == said
        assert not hasattr(args, "pipeline_model_parallel_layout")


def test_a_stage_that_would_hold_nothing(trained, tmp_path, capsys):
    source = trained(**PLAIN, pp=2, steps=STEPS)
    for layers in ("3,0,2,1", "0,0,6,0"):
        assert (
            main(
                [
                    "convert",
                    str(source.path),
                    str(tmp_path / "out"),
                    "--to",
                    "megatron",
                    "--pp",
                    "4",
                    "--stage-layers",
                    layers,
                ]
            )
            == 2
        )
        assert f"{layers}: stage 1 would hold nothing at all" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chunk_layers", [(1, 1, 1, 1), (2, 1, 2, 1), (1, 3, 1, 1), (0, 2, 2, 0)])
def test_chunks_are_told_in_one_way_only(chunk_layers):
    """Megatron-LM refuses more than one of these (training/arguments.py, core_r0.13.0 … main)."""
    target = TargetArguments(Layout(tp=1, pp=2, vpp=2), chunk_layers, None, None)
    said = [
        ARGUMENTS[name](target)
        for name in (
            "num_layers_per_virtual_pipeline_stage",
            "num_virtual_stages_per_pipeline_rank",
            "pipeline_model_parallel_layout",
        )
    ]
    assert sum(value is not None for value in said) == 1
