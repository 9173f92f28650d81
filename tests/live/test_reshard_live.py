"""A checkpoint in another parallel layout means the same: megatron-core itself loads it there and
trains on.

What every rank of the new layout then holds, weights and optimizer state, is compared bit for bit
with the source's live state cut by hand (examples/tiny/whole.py); losses before the first step and
training after it are compared with a run that was not interrupted. docs/relayout.md says where the
bounds come from."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from examples.tiny.trained import Trained, Truth, train_into
from examples.tiny.whole import ROLES, Sizes, cut_for, same
from tests.support.going_on import LOSS, TENSOR, convert, distances, losses
from tests.support.live import prove
from tests.support.relayouts import CASES, FOR_MINDSPORE, PADDING, ROUTED_IN_BF16, relayouts
from tests.support.resume import with_zeroed_moments
from tests.support.variants import CORES, ONLY, QUICK_CORES

BEFORE, AFTER = 3, 3

#: a key's bias shifts all scores of a query alike: its gradient is round-off, of which Adam makes
#: steps of full size
HALF_WITHOUT_GRADIENT = "linear_qkv.bias"

SAME_LOSSES = [name for name in CASES if name not in PADDING]


class Relaid(NamedTuple):
    """A run, the same going on, its checkpoint in another layout, and the run that goes on from
    that."""

    source: Trained
    uninterrupted: Trained
    checkpoint: Path
    resumed: Trained


def cases(*names: str) -> pytest.MarkDecorator:
    """Parametrize over (core, name, target); what is beyond the quick suite is marked full."""
    return pytest.mark.parametrize(
        ("core", "name", "target"),
        [
            pytest.param(
                core,
                name,
                target,
                id=f"{core}-{name}-{target}",
                marks=[] if is_quick else [pytest.mark.full],
            )
            for core, name, target, is_quick in relayouts(*names)
        ],
    )


@pytest.fixture(scope="session")
def resharded(
    trained: Callable[..., Trained], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Relaid]:
    """relaid(core, name, target): made once for all tests."""

    @functools.cache
    def run(core: str, name: str, target: str) -> Relaid:
        case, scratch = CASES[name], tmp_path_factory.mktemp(f"{core}-{name}-{target}")
        sizes = case.targets[target].sizes
        source = trained(**options(core, name, case.source, BEFORE))
        uninterrupted = trained(**options(core, name, case.source, BEFORE + AFTER))
        checkpoint = convert(source.path, scratch / "relaid", "megatron", sizes)
        return Relaid(
            source,
            uninterrupted,
            checkpoint,
            go_on(core, name, sizes, checkpoint, scratch / "resumed"),
        )

    return run


def options(core: str, name: str, sizes: Sizes, steps: int) -> dict[str, Any]:
    case, layout = CASES[name], sizes._asdict()
    stage_layers = layout.pop("stage_layers")
    if stage_layers:
        layout["first_stage_layers"] = stage_layers[0]
    return {
        "core": core,
        "plain": True,
        "steps": steps,
        "dtype": case.dtype,
        "global_batch": case.global_batch,
        **case.options,
        **layout,
    }


def go_on(core: str, name: str, sizes: Sizes, checkpoint: Path, out: Path) -> Trained:
    return train_into(out, options(core, name, sizes, BEFORE + AFTER) | {"resume": str(checkpoint)})


def assert_goes_on_alike(core: str, name: str, run: Relaid) -> None:
    dtype, own = CASES[name].dtype, losses(run.resumed, "steps")
    theirs = losses(run.uninterrupted, "steps")
    assert own.shape == (AFTER, CASES[name].global_batch // 2) and theirs.std() > 0.01
    largest = np.median if name in ROUTED_IN_BF16 else np.max
    assert largest(np.abs(own - theirs[BEFORE:])) < LOSS[dtype]
    assert (
        largest(np.abs(losses(run.resumed, "evaluated") - losses(run.uninterrupted, "evaluated")))
        < LOSS[dtype]
    )
    bound = TENSOR[dtype] * (5 if name in ROUTED_IN_BF16 else 1)
    far = {
        key: distance
        for key, distance in distances(run.resumed, run.uninterrupted).items()
        if distance > bound and not key[1].endswith(HALF_WITHOUT_GRADIENT)
    }
    assert not far


@cases()
def test_every_rank_holds_the_live_state(resharded, tmp_path, core, name, target):
    """Bit for bit, as megatron-core's own loaders brought it into the model and into the
    optimizer's shards."""
    run, sizes = resharded(core, name, target), CASES[name].targets[target].sizes
    expected = cut_for(run.source, sizes, tmp_path / "expected").truths()
    loaded = [Truth(file) for file in sorted((run.resumed.path / "resumed").glob("tp*.npz"))]
    assert [truth.place for truth in loaded] == [truth.place for truth in expected]
    for own, theirs in zip(loaded, expected, strict=True):
        assert own.meta["layers"] == theirs.meta["layers"] and set(own.names()) == set(
            theirs.names()
        )
        assert own.meta["scheduler"] == theirs.meta["scheduler"]
        assert {group["step"] for group in own.meta["param_groups"]} == {BEFORE}
        different = [
            (*key, role)
            for key in own.names()
            for role in ROLES
            if not same(own.array(*key, role), theirs.array(*key, role))
        ]
        assert not different


@cases(*SAME_LOSSES)
def test_losses_before_the_first_step_are_the_same(resharded, core, name, target):
    run = resharded(core, name, target)
    before = losses(run.source, "evaluated")
    largest = np.median if name in ROUTED_IN_BF16 else np.max
    difference = largest(np.abs(losses(run.resumed, "evaluated", "resumed") - before))
    assert before.std() > 0.05 and difference < LOSS[CASES[name].dtype]
    if CASES[name].targets[target].sizes == CASES[name].source:
        assert difference == 0


@cases(*SAME_LOSSES)
def test_training_goes_on_as_if_it_had_never_been_interrupted(resharded, core, name, target):
    assert_goes_on_alike(core, name, resharded(core, name, target))


@cases(*PADDING)
def test_padding_of_the_vocabulary_is_part_of_the_loss(resharded, core, name, target):
    """Megatron's softmax goes over the padded vocabulary: fewer rows of padding lower every loss,
    more raise it."""
    run = resharded(core, name, target)
    rows = [one.truths()[0].meta["args"]["padded_vocab_size"] for one in (run.source, run.resumed)]
    change = losses(run.resumed, "evaluated", "resumed") - losses(run.source, "evaluated")
    assert rows[0] != rows[1] and (np.sign(change) == np.sign(rows[1] - rows[0])).all()


@pytest.mark.parametrize("name", ["gpt", "buckets"])
def test_without_its_moments_training_goes_elsewhere(resharded, tmp_path, name):
    """The control: were the moments lost, the bounds above would tell."""
    core, target = "0.16.1", next(target for target in CASES[name].targets if target != "same")
    run, sizes = resharded(core, name, target), CASES[name].targets[target].sizes
    zeroed = with_zeroed_moments(run.checkpoint, tmp_path / "zeroed")
    elsewhere = run._replace(resumed=go_on(core, name, sizes, zeroed, tmp_path / "elsewhere"))
    with pytest.raises(AssertionError):
        assert_goes_on_alike(core, name, elsewhere)
    steps = losses(elsewhere.resumed, "steps"), losses(run.uninterrupted, "steps")[BEFORE:]
    assert np.abs(steps[0] - steps[1]).max() > 2e-2
    assert np.median([*distances(elsewhere.resumed, run.uninterrupted).values()]) > 0.3


def test_ranks_in_another_order_are_another_model(resharded, tmp_path):
    """The control of the losses before the first step: heads, columns and vocabulary rows of two
    ranks exchanged."""
    core, name, target = "0.16.1", "gpt", "tp4pp1"
    run, sizes = resharded(core, name, target), CASES[name].targets[target].sizes
    swapped = Path(shutil.copytree(run.checkpoint, tmp_path / "swapped"))
    one, other = (next(swapped.glob(f"iter_*/mp_rank_0{rank}")) for rank in (0, 1))
    for file in ("model_optim_rng.pt", "distrib_optim.pt"):
        (one / file).rename(tmp_path / file)
        (other / file).rename(one / file)
        (tmp_path / file).rename(other / file)
    other_model = go_on(core, name, sizes, swapped, tmp_path / "other_model")
    assert (
        np.abs(losses(other_model, "evaluated", "resumed") - losses(run.source, "evaluated")).max()
        > 0.02
    )


@cases("buckets")
def test_target_buckets_are_several_and_padded(resharded, core, name, target):
    """Otherwise nothing in the file would lie elsewhere than in the most plain of layouts."""
    run, sizes = resharded(core, name, target), CASES[name].targets[target].sizes
    for truth in run.resumed.truths():
        buckets = [
            bucket
            for leaf in truth.meta["buffers"]
            for buffer in leaf
            for bucket in buffer["buckets"]
        ]
        padding = [bucket["end"] - bucket["start"] - bucket["numel_unpadded"] for bucket in buckets]
        assert any(padding) or (core == "0.6.0" and sizes.dp == 1)
        assert truth.place[1] > 0 or len(buckets) >= 3


@pytest.mark.parametrize(
    ("core", "variant", "sizes"),
    [
        pytest.param(
            core,
            variant,
            sizes,
            id=f"{core}-{variant}-" + "".join(f"{k}{v}" for k, v in sizes._asdict().items() if v),
            marks=[] if is_quick and core in QUICK_CORES else [pytest.mark.full],
        )
        for variant, sizes, is_quick in FOR_MINDSPORE
        for core in CORES
        if core in ONLY.get(variant, CORES)
    ],
)
def test_mindspore_loads_the_live_state(trained_variant, tmp_path, core, variant, sizes):
    """Bit for bit; in these runs no two elements of a role are equal."""
    run = trained_variant(core, variant)
    prove(
        cut_for(run, sizes, tmp_path / "expected"),
        convert(run.path, tmp_path / "out", "mindspore", sizes),
    )
