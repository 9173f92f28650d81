"""Matrices that a file holds as [in, out], as GPT-2's Conv1D does: torch's own transposes and
slices, bit for bit.

A layer of GPT-2, cut over ranks by torch, is saved by torch or safetensors under the names of
transformers ([in, out]) or under Merak's of several ranks ([out, in]), and wanted in either way,
cut otherwise."""

import itertools
import random
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from parammap import families
from parammap.checkpoint.index import Index, NameResolver, StoredTensor, TensorEntry, atoms
from parammap.execute import writer
from parammap.execute.writer import Writer
from parammap.families import HF_GPT2, HF_OPT
from parammap.formats import safetensors, torch_zip
from parammap.formats.frames import Hole
from parammap.plan.plan import Wanted, WantedFile, in_a_row, interleaved
from parammap.plan.planner import FIRST, MEAN, OWN, Planner
from parammap.tensors.arrangement import (
    SHARD_0,
    VOCAB,
    Sizes,
    arranged,
)
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import (
    MAIN_PARAM,
    MODEL_PARAM,
    Extent,
    LogicalTensor,
    Stored,
    TensorSpec,
)
from parammap.tensors.shard import whole_of
from tests.support.transposed import (
    HIDDEN,
    SIZES,
    TENSORS,
    WAYS,
    Layer,
    bits,
    changed,
    cut,
    drawn,
    in_logical,
    laid,
    logical_digests,
    turned,
    wanted,
    written,
)

# --------------------------------------------------------------------------------------------------------------
# copies


@WAYS
@pytest.mark.parametrize("seed", range(4))
def test_any_cut_from_any_cut(stored, wants, seed, tmp_path, buffers) -> None:
    draw = random.Random(seed)
    tp, to = draw.choice([1, 2, 3, 4]), draw.choice([1, 2, 3, 4, 6])
    layer = Layer(tmp_path, seed, tp)
    layer.save(stored)
    ranks = [[wanted(name, wants, to, rank) for name in TENSORS] for rank in range(to)]
    results, outcome, plan = written(
        layer.index, [one for rank in ranks for one in rank], draw=draw
    )
    assert not plan.unused
    for (rank, name), result in zip(itertools.product(range(to), TENSORS), results, strict=True):
        expected = turned(cut(TENSORS[name][0], layer.weights[name], to, rank), wants)
        assert np.array_equal(result, bits(expected)), (name, tp, to, rank)
    assert {
        tensor.name: digest for (tensor, _), (digest, _) in outcome.digests.items()
    } == logical_digests(layer.weights)
    assert all(
        count == tensor.rows * tensor.cols for (tensor, _), (_, count) in outcome.digests.items()
    )


def test_a_tensor_and_each_part_of_it_are_one_fill(tmp_path):
    layer, names = Layer(tmp_path), ("layers.0.attention.qkv.weight", "layers.0.mlp.fc1.weight")
    layer.save(True)
    for wants in (True, False):
        _, _, plan = written(layer.index, [wanted(name, wants) for name in names])
        assert [len(fills) for fills in plan.tasks[0].fills] == [3, 1]


@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_files_cut_at_any_element(wants, seed, tmp_path, buffers):
    """As a sharded optimizer keeps a parameter: runs of its elements, in files of their own."""
    name, draw, layer = "layers.0.attention.qkv.weight", random.Random(seed), Layer(tmp_path, seed)
    content = turned(layer.weights[name], True).reshape(-1)
    edges = [0, *sorted(draw.sample(range(1, content.numel()), 3)), content.numel()]
    extents = []
    for low, high in itertools.pairwise(edges):
        torch.save([content[low:high].clone()], tmp_path / f"{low}.pt")
        extents += torch_zip.read(tmp_path / f"{low}.pt")[0].extents
    stored = Stored("float32", (HIDDEN, 3 * HIDDEN), tuple(extents))
    naming = NameResolver(HF_GPT2, Layout(), None, None, SIZES, False)
    index = Index(
        [naming.hold(TensorEntry(TENSORS[name][2], Place(), MAIN_PARAM, stored))], Layout()
    )
    index.check_complete()
    (result,), outcome, _ = written(index, [wanted(name, wants)], draw=draw)
    assert np.array_equal(result, bits(turned(layer.weights[name], wants)))
    assert {
        tensor.name: digest for (tensor, _), (digest, _) in outcome.digests.items()
    }.items() <= logical_digests(layer.weights).items()


def test_values_are_cast_on_the_way(tmp_path, buffers):
    layer, name = Layer(tmp_path, tp=2), "layers.0.mlp.fc2.weight"
    layer.save(True)
    results, _, _ = written(
        layer.index, [wanted(name, wants, dtype="bfloat16") for wants in (False, True)]
    )
    for wants, result in enumerate(results):
        assert np.array_equal(result, bits(turned(layer.weights[name].bfloat16(), bool(wants))))


@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_padding_of_a_vocabulary_that_lies_transposed(wants, rows, tmp_path, buffers):
    """Of 11 words, padded to 12, of which as many rows more are wanted: copies of the last."""
    table, sizes = drawn((12, 10), 0), Sizes(vocab=11)
    save_file({"lm_head.kernel": table.t().contiguous()}, tmp_path / "head.safetensors")
    found = TensorEntry(
        "lm_head.kernel",
        Place(),
        MAIN_PARAM,
        safetensors.read(tmp_path / "head.safetensors")["lm_head.kernel"],
    )
    row = families.Row("output.weight", VOCAB, True)
    held = StoredTensor(
        found,
        row.canonical,
        row,
        VOCAB,
        atoms(MAIN_PARAM, row.canonical, VOCAB, "float32", arranged(VOCAB, (12, 10), 1, 0, sizes)),
    )
    shape = (11 + rows, 10)
    one = laid(
        "out",
        shape,
        atoms(MAIN_PARAM, row.canonical, VOCAB, "float32", arranged(VOCAB, shape, 1, 0, sizes)),
        wants,
    )
    (result,), outcome, _ = written(Index([held], Layout()), [one])
    expected = torch.cat([table, table[-1:].expand(rows - 1, -1)])
    assert np.array_equal(result, bits(turned(expected, wants)))
    assert {count for _, count in outcome.digests.values()} == {110, 10}


# --------------------------------------------------------------------------------------------------
# copys and replicas


@pytest.mark.parametrize("copy", [False, True])
@WAYS
@pytest.mark.parametrize(("tp", "to"), [(1, 1), (3, 2)])
def test_model_copies_are_compared_at_the_right_elements(
    stored, wants, copy, tp, to, tmp_path, buffers, monkeypatch
):
    """The model's own copy lies as the optimizer's weight does, or the other way round."""
    monkeypatch.setattr("parammap.execute.checks.SHOWN_POSITIONS", 1000)
    layer = Layer(tmp_path, 1, tp)
    layer.save(stored)
    model, where = changed(
        {name: weight.bfloat16() for name, weight in layer.weights.items()}, random.Random(0), 9
    )
    layer.save(copy, MODEL_PARAM, model)
    results, outcome, _ = written(
        layer.index, [wanted(name, wants, to, rank) for rank in range(to) for name in TENSORS]
    )
    assert in_logical(outcome.misfits) == where
    assert sum(misfit.count for misfit in outcome.misfits.values()) == 9 * len(where)
    for (rank, name), result in zip(itertools.product(range(to), TENSORS), results, strict=True):
        assert np.array_equal(
            result, bits(turned(cut(TENSORS[name][0], layer.weights[name], to, rank), wants))
        )


@WAYS
def test_a_copy_whose_parts_are_tensors_of_their_own(stored, wants, tmp_path, monkeypatch):
    monkeypatch.setattr("parammap.execute.checks.SHOWN_POSITIONS", 1000)
    layer, name = Layer(tmp_path), "layers.0.attention.qkv.weight"
    layer.save(stored)
    model, where = changed({name: layer.weights[name].bfloat16()}, random.Random(0), 9)
    naming = NameResolver(HF_OPT, layer.layout, None, None, SIZES, False)
    for key, part in zip("qkv", model[name].chunk(3), strict=True):
        key = f"decoder.layers.0.self_attn.{key}_proj.weight"
        for found, there in layer._written({key: part.clone()}, key).items():
            layer.held.append(
                naming.hold(TensorEntry(found.strip("[']"), Place(), MODEL_PARAM, there))
            )
    (result,), outcome, _ = written(layer.index, [wanted(name, wants)])
    assert in_logical(outcome.misfits) == where
    assert np.array_equal(result, bits(turned(layer.weights[name], wants)))


@WAYS
@pytest.mark.parametrize("replicas", [OWN, FIRST, MEAN])
def test_copies_are_compared_at_the_right_elements(
    stored, wants, replicas, tmp_path, buffers, monkeypatch
):
    monkeypatch.setattr("parammap.execute.checks.SHOWN_POSITIONS", 1000)
    layer = Layer(tmp_path, 2, tp=1 if replicas == OWN else 2, ep=2)
    other, where = changed(layer.weights, random.Random(0), 5)
    layer.save(stored)
    layer.save(stored, weights=other, ep=1)
    mine, outcome, _ = written(
        layer.index, [wanted(name, wants) for name in TENSORS], replicas, ep=1
    )
    means = {
        name: (weight.double() + other[name].double()).div(2).float()
        for name, weight in layer.weights.items()
    }
    taken = {OWN: other, FIRST: layer.weights, MEAN: means}[replicas]
    for name, result in zip(TENSORS, mine, strict=True):
        assert np.array_equal(result, bits(turned(taken[name], wants))), name
    assert in_logical(outcome.unequal) == ({} if replicas == OWN else where)
    assert {
        tensor.name: digest for (tensor, _), (digest, _) in outcome.digests.items()
    } == logical_digests(taken)


def test_what_is_not_finite_is_named_by_its_logical_place(tmp_path, buffers):
    layer, name = Layer(tmp_path, tp=2), "layers.0.attention.qkv.weight"
    layer.weights[name][HIDDEN + 5, 17] = float("nan")
    layer.save(True)
    for wants in (True, False):
        _, outcome, _ = written(layer.index, [wanted(name, wants)])
        ((tensor, found),) = outcome.non_finite.items()
        assert (
            tensor.name.endswith("attention.k.weight")
            and found.count == 1
            and found.positions[0][:2] == (5, 17)
        )


# --------------------------------------------------------------------------------------------- what
# lies in several orders


@pytest.mark.parametrize("wants", [False, True])
def test_one_tensor_that_lies_both_ways(wants, tmp_path, buffers, monkeypatch):
    """One rank's file holds it transposed, the other's as it is; copies are compared all the
    same."""
    monkeypatch.setattr("parammap.execute.checks.SHOWN_POSITIONS", 1000)
    layer = Layer(tmp_path, tp=1, ep=2)
    other, where = changed(layer.weights, random.Random(0), 5)
    layer.save(True)
    layer.save(False, weights=other, ep=1)
    results, outcome, _ = written(layer.index, [wanted(name, wants) for name in TENSORS], FIRST)
    for name, result in zip(TENSORS, results, strict=True):
        assert np.array_equal(result, bits(turned(layer.weights[name], wants)))
    assert in_logical(outcome.unequal) == where


def test_parts_that_lie_transposed_are_interleaved(tmp_path, buffers):
    layer, name = Layer(tmp_path), "layers.0.attention.qkv.weight"
    layer.save(True)
    one = wanted(name, True)
    (result,), _, _ = written(
        layer.index, [Wanted(one.spec, interleaved([(part,) for part in one.parts]))]
    )
    q, k, v = layer.weights[name].chunk(3)
    assert np.array_equal(
        result, bits(torch.stack([q.t(), k.t(), v.t()], dim=2).reshape(HIDDEN, 3 * HIDDEN))
    )


def test_parts_that_lie_differently_make_one_tensor(tmp_path, buffers):
    layer, content = Layer(tmp_path), drawn((HIDDEN, HIDDEN), 9)
    layer.save(True)
    content.numpy().tofile(tmp_path / "plain")
    other, out = (
        LogicalTensor(MAIN_PARAM, name, "float32", (HIDDEN, HIDDEN))
        for name in ("other", "layers.0.attention.out.weight")
    )
    stored = Stored(
        "float32", (HIDDEN, HIDDEN), (Extent(str(tmp_path / "plain"), 0, 4 * HIDDEN * HIDDEN),)
    )
    held = StoredTensor(
        TensorEntry("other", Place(), MAIN_PARAM, stored),
        "other",
        None,
        SHARD_0,
        (whole_of(other),),
    )
    parts = in_a_row([whole_of(out), whole_of(other)])
    (result,), _, _ = written(
        Index([*layer.held, held], Layout()), [laid("out", (2 * HIDDEN, HIDDEN), parts, True)]
    )
    assert np.array_equal(result, bits(torch.cat([layer.weights[out.name], content]).t()))


def test_memory_does_not_grow_with_the_matrix(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "STRIP_BYTES", 1 << 20)
    weight = drawn((3000, 4000), 0)
    save_file({"h.0.mlp.c_fc.weight": weight.t().contiguous()}, tmp_path / "w.safetensors")
    (stored,) = safetensors.read(tmp_path / "w.safetensors").values()
    held = NameResolver(HF_GPT2, Layout(), None, None, SIZES, False).hold(
        TensorEntry("h.0.mlp.c_fc.weight", Place(), MAIN_PARAM, stored)
    )
    one = Wanted(TensorSpec("out", "float32", (3000, 4000)), held.parts)
    plan = Planner(Index([held], Layout())).plan(
        [WantedFile("out", (Hole(0, 0, stored.nbytes),), (one,))]
    )
    assert plan.tasks[0].fills[0][0].is_turned
    with open(tmp_path / "out", "wb") as out:
        tracemalloc.start()
        Writer(plan.tasks[0], out, lambda nbytes: None).write()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 6 << 20 < stored.nbytes
    assert np.array_equal(
        np.fromfile(tmp_path / "out", np.uint32).reshape(3000, 4000), bits(weight)
    )
