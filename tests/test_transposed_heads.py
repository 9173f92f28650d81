"""Matrices that a file holds as [in, out], with q, k and v side by side, taken apart by heads and read together."""

import itertools
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from convert import families, writer
from convert.digest import box_digest
from convert.fusion import QKV, ROWS
from convert.index import Found, Held, Index
from convert.layout import Layout, Place
from convert.plan import Wanted
from convert.planner import FIRST, MEAN
from convert.tensors import MODEL_WEIGHT, WEIGHT, Box, Extent, Stored, Tensor, TensorSpec
from tests.test_transposed_source import (
    HEADS,
    HIDDEN,
    Layer,
    bits,
    buffers,  # noqa: F401 - a fixture
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
    results, outcome, _ = written(layer.index, [wanted(NAME, wants, to, rank, QKV) for rank in range(to)], draw=draw)
    for rank, result in enumerate(results):
        assert np.array_equal(result, bits(turned(by_head(layer.weights[NAME]).chunk(to)[rank], wants)))
    assert {tensor.name: digest for (tensor, _), (digest, _) in outcome.digests.items()}.items() <= logical_digests(
        layer.weights).items()


@pytest.mark.parametrize(("strip", "count", "nbytes"), [(1 << 20, 1, 4 * 3 * HIDDEN * HIDDEN), (3456, 6 * HIDDEN, 4 * 12)])
def test_heads_side_by_side_are_read_together(strip, count, nbytes, tmp_path, monkeypatch):
    """All at once, or in two strips, of each row half of q, of k and of v."""
    layer, reads, read = Layer(tmp_path), [], os.preadv
    layer.save(True)
    index = layer.index
    monkeypatch.setattr(writer, "STRIP_BYTES", strip)
    monkeypatch.setattr(writer, "_GAP_BYTES", 0)
    monkeypatch.setattr(writer.os, "preadv", lambda file, views, at: reads.append(len(views[0])) or read(file, views, at))
    _, _, plan = written(index, [wanted(NAME, False, kind=QKV)])
    assert reads == [nbytes] * count and plan.tasks[0].bytes_read == 4 * 3 * HIDDEN * HIDDEN


@pytest.mark.parametrize("tp", [1, 3])
def test_a_file_is_one_copy_of_q_k_and_v(tp, tmp_path):
    layer = Layer(tmp_path, tp=tp)
    layer.save(True)
    _, _, plan = written(layer.index, [wanted(NAME, False, kind=QKV)])
    rows = HIDDEN // tp
    assert [[(tensor.name.split(".")[-2], box) for tensor, box in copy.blocks] for copy in plan.tasks[0].reads()] == [
        [(atom, Box(0, HIDDEN, rank * rows, rows)) for atom in "qkv"] for rank in range(tp)]


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("replicas", [FIRST, MEAN])
@SMALL_BUFFERS
def test_twins_and_copies_are_compared_where_parts_are_taken_apart_by_heads(twin, replicas, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.checks.SHOWN_POSITIONS", 1000)
    layer = Layer(tmp_path, 3, ep=2)
    other, differing = changed(layer.weights, random.Random(0), 20)
    model, stale = changed({name: weight.bfloat16() for name, weight in layer.weights.items()}, random.Random(1), 20)
    layer.save(True)
    layer.save(True, weights=other, ep=1)
    layer.save(twin, MODEL_WEIGHT, model)
    (result,), outcome, _ = written(layer.index, [wanted(NAME, False, kind=QKV)], replicas)
    mean = (layer.weights[NAME].double() + other[NAME].double()).div(2).float()
    assert np.array_equal(result, bits(by_head({FIRST: layer.weights[NAME], MEAN: mean}[replicas])))
    assert in_logical(outcome.misfits) == {NAME: stale[NAME]} and in_logical(outcome.unequal) == {NAME: differing[NAME]}


# -------------------------------------------------------------------------------- what cannot be read or taken together


def lying(folder: Path, name: str, content: torch.Tensor, blocks: list[tuple[Tensor, Box]], is_transposed: bool) -> Held:
    """A matrix in a file of its own, made of blocks side by side."""
    content.contiguous().view(torch.uint8).numpy().tofile(folder / name)
    extent = Extent(str(folder / name), 0, content.nbytes)
    found = Found(name, Place(), WEIGHT, Stored(str(content.dtype)[6:], tuple(content.shape), (extent,)))
    row = families.Row(name, ROWS, None, True) if is_transposed else None
    return Held(found, name, row, ROWS, tuple(blocks), 1 if is_transposed else len(blocks))


def whole(name: str, matrix: torch.Tensor) -> tuple[Tensor, Box]:
    return Tensor(WEIGHT, name, str(matrix.dtype)[6:], tuple(matrix.shape)), Box(0, len(matrix), 0, matrix.shape[1])


def taken(matrix: torch.Tensor, box: Box) -> torch.Tensor:
    return matrix[box.row:box.row + box.rows, box.col:box.col + box.cols]


@SMALL_BUFFERS
def test_parts_of_other_precision_follow_each_other(tmp_path):
    parts = {"a": drawn((6, 20), 0), "b": drawn((9, 20), 1).bfloat16()}
    held = [lying(tmp_path, name, part.t(), [whole(name, part)], True) for name, part in parts.items()]
    one = Wanted(TensorSpec("out", "bfloat16", (15, 20)), tuple(itertools.starmap(whole, parts.items())))
    (result,), _, _ = written(Index(held, Layout()), [one])
    assert np.array_equal(result, bits(torch.cat([part.bfloat16() for part in parts.values()])))


@SMALL_BUFFERS
def test_parts_side_by_side_go_one_below_the_other(tmp_path):
    parts = {name: drawn((20, 6), seed) for seed, name in enumerate("ab")}
    blocks = list(itertools.starmap(whole, parts.items()))
    held = lying(tmp_path, "ab", torch.cat(list(parts.values()), dim=1), blocks, False)
    (result,), _, _ = written(Index([held], Layout()), [
        Wanted(TensorSpec("out", "float32", (6, 40)), tuple(blocks), transposed=True)])
    assert np.array_equal(result, bits(torch.cat(list(parts.values())).t()))


@SMALL_BUFFERS
def test_parts_of_other_widths_follow_each_other(tmp_path):
    layer, name = Layer(tmp_path), "layers.0.attention.out.weight"
    layer.save(True)
    tensor, boxes = whole(name, layer.weights[name])[0], (Box(0, HIDDEN, 0, 7), Box(0, HIDDEN, 7, HIDDEN - 7))
    (result,), outcome, _ = written(layer.index, [
        Wanted(TensorSpec("out", "float32", (HIDDEN * HIDDEN,)), tuple((tensor, box) for box in boxes))])
    assert np.array_equal(result, bits(torch.cat([taken(layer.weights[name], box).reshape(-1) for box in boxes])))
    assert outcome.digests[tensor, 0] == (logical_digests(layer.weights)[name], tensor.rows * tensor.cols)


@SMALL_BUFFERS
def test_parts_side_by_side_in_another_order_than_in_their_tensors(tmp_path):
    """Of neighbours, some differ in their rows only, some in their columns, some in their tensor."""
    matrices = {name: drawn((12, 20), seed) for seed, name in enumerate("ab")}
    order = [("a", 0, 0), ("a", 6, 10), ("a", 0, 10), ("b", 6, 10), ("b", 0, 10), ("b", 6, 0), ("b", 0, 0), ("a", 6, 0)]
    blocks = [(whole(name, matrices[name])[0], Box(row, 6, col, 10)) for name, row, col in order]
    parts = [taken(matrices[tensor.name], box) for tensor, box in blocks]
    held = lying(tmp_path, "ab", torch.cat(parts).t(), blocks, True)
    (result,), outcome, plan = written(Index([held], Layout()), [
        Wanted(TensorSpec("out", "float32", (48, 10)), tuple(blocks[::-1]))])
    assert np.array_equal(result, bits(torch.cat(parts[::-1]))) and len(list(plan.tasks[0].reads())) == 1
    for name, matrix in matrices.items():
        tensor, box = whole(name, matrix)
        assert outcome.digests[tensor, 0] == (box_digest(bits(matrix).reshape(-1), box), 240)
