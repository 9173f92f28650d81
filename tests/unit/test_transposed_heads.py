"""Matrices that a file holds as [in, out], with q, k and v side by side, taken apart by heads and
read together."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from parammap import families
from parammap.checkpoint.index import Index, StoredTensor, TensorEntry
from parammap.plan.plan import Wanted, in_a_row
from parammap.plan.planner import FIRST, MEAN
from parammap.tensors.arrangement import QKV, SHARD_0
from parammap.tensors.digest import cells_digest
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import (
    MAIN_PARAM,
    MODEL_PARAM,
    Extent,
    LogicalTensor,
    Stored,
    TensorSpec,
)
from parammap.tensors.region import Cells, Region
from parammap.tensors.shard import Shard, transposed, whole_of
from parammap.tensors.view import View
from tests.support.transposed import (
    HEADS,
    HIDDEN,
    Layer,
    bits,
    changed,
    drawn,
    in_logical,
    logical_digests,
    turned,
    wanted,
    written,
)

NAME = "layers.0.attention.qkv.weight"
SMALL_BUFFERS = pytest.mark.usefixtures("buffers")


def by_head(fused: torch.Tensor) -> torch.Tensor:
    """[q; k; v] as Megatron-LM has it: q, k and v of one head after the other."""
    return fused.view(3, HEADS, HIDDEN // HEADS, HIDDEN).transpose(0, 1).reshape(3 * HIDDEN, HIDDEN)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("wants", [False, True])
@SMALL_BUFFERS
def test_parts_side_by_side_are_taken_apart_by_heads(wants, seed, tmp_path):
    draw = random.Random(seed)
    layer, to = Layer(tmp_path, seed, draw.choice([1, 2, 3])), draw.choice([1, 2, 4])
    layer.save(True)
    results, outcome, _ = written(
        layer.index, [wanted(NAME, wants, to, rank, QKV) for rank in range(to)], draw=draw
    )
    for rank, result in enumerate(results):
        assert np.array_equal(
            result, bits(turned(by_head(layer.weights[NAME]).chunk(to)[rank], wants))
        )
    assert {
        tensor.name: digest for (tensor, _), (digest, _) in outcome.digests.items()
    }.items() <= logical_digests(layer.weights).items()


@pytest.mark.parametrize("tp", [1, 3])
def test_q_k_and_v_of_a_file_are_one_fill_each(tp, tmp_path):
    """Whatever the number of heads: these are an axis of a view."""
    layer = Layer(tmp_path, tp=tp)
    layer.save(True)
    _, _, plan = written(layer.index, [wanted(NAME, False, kind=QKV)])
    rows = HIDDEN // tp
    assert {
        (fill.tensor.name.split(".")[-2], fill.region, len(fill.target.shape))
        for fill in plan.tasks[0].fills[0]
    } == {
        (atom, Region((rank * rows, 0), (rows, HIDDEN)), 3) for atom in "qkv" for rank in range(tp)
    }
    assert plan.tasks[0].bytes_read == 4 * 3 * HIDDEN * HIDDEN


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("replicas", [FIRST, MEAN])
@SMALL_BUFFERS
def test_model_copies_and_replicas_are_compared_where_parts_are_taken_apart_by_heads(
    copy, replicas, tmp_path, monkeypatch
):
    monkeypatch.setattr("parammap.execute.checks.SHOWN_POSITIONS", 1000)
    layer = Layer(tmp_path, 3, ep=2)
    other, differing = changed(layer.weights, random.Random(0), 20)
    model, stale = changed(
        {name: weight.bfloat16() for name, weight in layer.weights.items()}, random.Random(1), 20
    )
    layer.save(True)
    layer.save(True, weights=other, ep=1)
    layer.save(copy, MODEL_PARAM, model)
    (result,), outcome, _ = written(layer.index, [wanted(NAME, False, kind=QKV)], replicas)
    mean = (layer.weights[NAME].double() + other[NAME].double()).div(2).float()
    assert np.array_equal(result, bits(by_head({FIRST: layer.weights[NAME], MEAN: mean}[replicas])))
    assert in_logical(outcome.misfits) == {NAME: stale[NAME]} and in_logical(outcome.unequal) == {
        NAME: differing[NAME]
    }


# -------------------------------------------------------------------------------- what cannot be
# read or taken together


def lying(
    folder: Path, name: str, content: torch.Tensor, parts: tuple[Shard, ...], is_transposed: bool
) -> StoredTensor:
    """A matrix in a file of its own, made of parts."""
    content.contiguous().view(torch.uint8).numpy().tofile(folder / name)
    extent = Extent(str(folder / name), 0, content.nbytes)
    found = TensorEntry(
        name, Place(), MAIN_PARAM, Stored(str(content.dtype)[6:], tuple(content.shape), (extent,))
    )
    return StoredTensor(
        found,
        name,
        families.Row(name, SHARD_0, True) if is_transposed else None,
        SHARD_0,
        parts,
    )


def whole(name: str, matrix: torch.Tensor) -> Shard:
    return whole_of(LogicalTensor(MAIN_PARAM, name, str(matrix.dtype)[6:], tuple(matrix.shape)))


def taken(matrix: torch.Tensor, region: Region) -> torch.Tensor:
    (row, col), (row_end, col_end) = region.offsets, region.ends
    return matrix[row:row_end, col:col_end]


@SMALL_BUFFERS
def test_parts_of_other_precision_follow_each_other(tmp_path):
    parts = {"a": drawn((6, 20), 0), "b": drawn((9, 20), 1).bfloat16()}
    held = [
        lying(tmp_path, name, part.t(), (whole(name, part),), True) for name, part in parts.items()
    ]
    one = Wanted(
        TensorSpec("out", "bfloat16", (15, 20)),
        tuple(
            part.at("", at * 20 * part.view.itemsize)
            for part, at in zip(itertools.starmap(whole, parts.items()), (0, 6), strict=True)
        ),
    )
    (result,), _, _ = written(Index(held, Layout()), [one])
    assert np.array_equal(result, bits(torch.cat([part.bfloat16() for part in parts.values()])))


@SMALL_BUFFERS
def test_parts_side_by_side_go_one_below_the_other(tmp_path):
    parts = {name: drawn((20, 6), seed) for seed, name in enumerate("ab")}
    shards = [whole(name, part) for name, part in parts.items()]
    side_by_side = tuple(
        replace(shard, view=View("", 24 * number, "float32", (20, 6), (48, 4)))
        for number, shard in enumerate(shards)
    )
    held = lying(tmp_path, "ab", torch.cat(list(parts.values()), dim=1), side_by_side, False)
    (result,), _, _ = written(
        Index([held], Layout()),
        [Wanted(TensorSpec("out", "float32", (6, 40)), transposed(in_a_row(shards), (40, 6)))],
    )
    assert np.array_equal(result, bits(torch.cat(list(parts.values())).t()))


@SMALL_BUFFERS
def test_parts_of_other_widths_follow_each_other(tmp_path):
    layer, name = Layer(tmp_path), "layers.0.attention.out.weight"
    layer.save(True)
    tensor = whole(name, layer.weights[name]).tensor
    regions = Region((0, 0), (HIDDEN, 7)), Region((0, 7), (HIDDEN, HIDDEN - 7))
    (result,), outcome, _ = written(
        layer.index,
        [
            Wanted(
                TensorSpec("out", "float32", (HIDDEN * HIDDEN,)),
                in_a_row(whole_of(tensor, region) for region in regions),
            )
        ],
    )
    assert np.array_equal(
        result,
        bits(torch.cat([taken(layer.weights[name], region).reshape(-1) for region in regions])),
    )
    assert outcome.digests[tensor, 0] == (
        logical_digests(layer.weights)[name],
        tensor.rows * tensor.cols,
    )


@SMALL_BUFFERS
def test_parts_side_by_side_in_another_order_than_in_their_tensors(tmp_path):
    """Of neighbours, some differ in their rows only, some in their columns, some in their
    tensor."""
    matrices = {name: drawn((12, 20), seed) for seed, name in enumerate("ab")}
    order = [
        ("a", 0, 0),
        ("a", 6, 10),
        ("a", 0, 10),
        ("b", 6, 10),
        ("b", 0, 10),
        ("b", 6, 0),
        ("b", 0, 0),
        ("a", 6, 0),
    ]
    shards = [
        whole_of(whole(name, matrices[name]).tensor, Region((row, col), (6, 10)))
        for name, row, col in order
    ]
    parts = [taken(matrices[shard.tensor.name], shard.region) for shard in shards]
    held = lying(tmp_path, "ab", torch.cat(parts).t(), in_a_row(shards), True)
    (result,), outcome, _ = written(
        Index([held], Layout()),
        [Wanted(TensorSpec("out", "float32", (48, 10)), in_a_row(shards[::-1]))],
    )
    assert np.array_equal(result, bits(torch.cat(parts[::-1])))
    for name, matrix in matrices.items():
        assert outcome.digests[whole(name, matrix).tensor, 0] == (
            cells_digest(bits(matrix), Cells(0, 0, (1,))),
            240,
        )
