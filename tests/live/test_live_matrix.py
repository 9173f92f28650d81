"""Real Megatron resumes what was converted: models, formats and layouts by the matrix of
tests/support/live_matrix.py.

A run trains, saves and goes on; its checkpoint is converted by the command line, and megatron-core
resumes it in the new layout for as many steps. Every state that it loads is the source's bit for
bit, cut by hand (examples/tiny/whole.py); the losses, the norms of the gradients and the state at
the end are those of the source's own going on, within the bounds of docs/relayout.md; and the
buckets of what was written are in the order of those that Megatron itself saves there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from examples.tiny.trained import Trained, Truth, train_into
from examples.tiny.whole import ROLES, cut_for, same
from parammap.cli.main import main
from tests.support.going_on import LOSS, NORM, TENSOR, convert, distances, losses
from tests.support.live_matrix import (
    AFTER,
    BEFORE,
    CHAINS,
    LAYOUTS,
    NORM_BY_TP,
    QUICK,
    WEIGHTS,
    Cell,
    buckets,
    cells,
)

#: the format in which megatron-core saves in the new layout, to compare the buckets
SAVED_AS = {"torch": "torch", "torch_dist": "torch_dist", "mindspore": "torch"}


#: the padding of the vocabulary, which Transformers lacks, is part of Megatron's losses
UNPADDED = {"vocab": 256}


class Lived(NamedTuple):
    """A run that went on after it had saved, its checkpoint converted, and the run that goes on
    from that."""

    source: Trained
    checkpoint: Path
    resumed: Trained


def every_cell(among: Callable[[Cell], bool] = lambda cell: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "cell",
        [
            pytest.param(cell, id="-".join(cell), marks=[] if cell in QUICK else [pytest.mark.full])
            for cell in cells()
            if among(cell)
        ],
    )


def same_norm(cell: Cell) -> bool:
    return cell.model not in NORM_BY_TP or LAYOUTS[cell.layout].tp == LAYOUTS[cell.target].tp


@pytest.fixture(scope="session")
def lived(
    trained: Callable[..., Trained], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Cell], Lived]:
    """lived(cell): made once for all tests."""

    @functools.cache
    def run(cell: Cell) -> Lived:
        scratch = tmp_path_factory.mktemp("-".join(cell))
        source = trained(**cell.options(steps=BEFORE, further_steps=AFTER))
        checkpoint = source.path
        for framework in CHAINS[cell.chain]:
            sizes = None if framework == "megatron-dist" else LAYOUTS[cell.target]
            flags = cell.flags(framework)
            checkpoint = convert(checkpoint, scratch / framework, framework, sizes, *flags)
        options = cell.options(cell.target, steps=BEFORE + AFTER, ckpt_format=SAVED_AS[cell.chain])
        return Lived(
            source,
            checkpoint,
            train_into(scratch / "resumed", options | {"resume": str(checkpoint)}),
        )

    return run


@every_cell()
def test_every_rank_holds_the_live_state(lived, tmp_path, cell):
    run = lived(cell)
    expected = cut_for(run.source, LAYOUTS[cell.target], tmp_path / "expected").truths()
    loaded = [Truth(file) for file in sorted((run.resumed.path / "resumed").glob("tp*.npz"))]
    assert [truth.place for truth in loaded] == [truth.place for truth in expected]
    for own, theirs in zip(loaded, expected, strict=True):
        assert set(own.names()) == set(theirs.names())
        assert own.meta["scheduler"] == theirs.meta["scheduler"]
        assert {group["step"] for group in own.meta["param_groups"]} == {BEFORE}
        different = [
            (*key, role)
            for key in own.names()
            for role in ROLES
            if not same(own.array(*key, role), theirs.array(*key, role))
        ]
        assert not different


@every_cell(same_norm)
def test_training_goes_on_as_the_source_does(lived, cell):
    run, dtype = lived(cell), cell.options()["dtype"]
    own, theirs = losses(run.resumed, "steps"), losses(run.source, "steps", "further")
    assert (
        own.shape == theirs.shape == (AFTER, cell.options()["global_batch"] // 2)
        and theirs.std() > 0.01
    )
    assert np.abs(own - theirs).max() < LOSS[dtype]
    own, theirs = norms(run.resumed, "truth"), norms(run.source, "further")
    assert own.shape == theirs.shape == (AFTER,) and np.abs(own / theirs - 1).max() < NORM[dtype]
    assert not {
        key: far
        for key, far in distances(run.resumed, run.source, "further").items()
        if far > TENSOR[dtype] and not key[1].endswith("linear_qkv.bias")
    }


def norms(run: Trained, folder: str) -> np.ndarray:
    """Of the gradients of each step; every rank knows the same."""
    first, *others = (
        np.load(file)["norms"] for file in sorted((run.path / folder).glob("losses_*.npz"))
    )
    assert all(np.array_equal(first, other) for other in others)
    return first


@every_cell(lambda cell: cell.chain != "torch_dist")  # which has no buckets
def test_buckets_are_those_that_megatron_saves_there(lived, cell):
    run = lived(cell)
    assert buckets(run.checkpoint) == buckets(run.resumed.path) != {}


@every_cell()
def test_verify_and_diff_have_no_complaint(lived, capsys, cell):
    run = lived(cell)
    assert main(["verify", str(run.checkpoint)]) == 0, capsys.readouterr()
    assert main(["diff", str(run.source.path), str(run.checkpoint)]) == 0, capsys.readouterr()


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_weights_alone_are_the_same_model(trained, tmp_path, name):
    """megatron-core loads them into a new run, whose losses before its first step are those of the
    source."""
    cell, frameworks, flags = WEIGHTS[name]
    source = trained(**cell.options(steps=BEFORE, **UNPADDED))
    checkpoint = source.path
    for framework in frameworks:
        sizes = None if framework == "transformers" else LAYOUTS[cell.target]
        checkpoint = convert(
            checkpoint, tmp_path / framework, framework, sizes, *flags.get(framework, ())
        )
    options = cell.options(
        cell.target, steps=BEFORE + 1, ckpt_format="torch", resume=str(checkpoint), **UNPADDED
    )
    resumed = train_into(tmp_path / "resumed", options)
    before = losses(source, "evaluated")
    assert before.std() > 0.05
    assert np.abs(losses(resumed, "evaluated", "resumed") - before).max() < LOSS[options["dtype"]]


def test_quick_cells_exist():
    assert set(QUICK) <= set(cells())
