"""Checkpoints whose matrices lie as [in, out]: compared, digested, repaired and located, in logical
[out, in] places."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from parammap.checkpoint.index import Index
from parammap.proof import repair
from parammap.proof.compare import Pair, differences
from parammap.proof.locate import identify, locate
from parammap.proof.replicas import unequal
from parammap.proof.verify import digests
from parammap.tensors.arrangement import STACKED_QKV
from tests.support.transposed import (
    HIDDEN,
    TENSORS,
    WAYS,
    Layer,
    bits,
    changed,
    cut,
    in_logical,
    logical_digests,
    turned,
)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr("parammap.proof.stream.BAND_BYTES", 100)
    monkeypatch.setattr("parammap.proof.stream.TILE_BYTES", 500)


@pytest.mark.parametrize("tp", [1, 3])
@WAYS
def test_checkpoints_are_compared_element_by_element(stored, wants, tp, tmp_path, small_tiles):
    (tmp_path / "b").mkdir()
    a, b = Layer(tmp_path, 0, tp), Layer(tmp_path / "b", 0, 2)
    a.save(stored)
    b.weights, where = changed(a.weights, random.Random(1), 4)
    b.save(wants)
    sides = a.index, b.index
    theirs = {tensor.name: tensor for tensor in sides[1].shards}
    found = differences(*sides, [Pair(tensor, theirs[tensor.name]) for tensor in sides[0].shards])
    positions = {
        one.a: type("Found", (), {"positions": [(at.row, at.column) for at in one.positions]})
        for one in found
    }
    assert in_logical(positions) == where and sum(one.elements for one in found) == 4 * len(where)
    for one in found:
        assert one.positions == sorted(one.positions, key=lambda at: (at.row, at.column))
        for at in one.positions:
            assert at.b == 2 * at.a
            for value, (file, offset) in ((at.a, at.place_a), (at.b, at.place_b)):
                assert np.fromfile(file, "<f4", 1, offset=offset)[0] == np.float32(value)
    for side, layer in zip(sides, (a, b), strict=True):
        read = {tensor.name: summed.digests for tensor, summed in digests(side).items()}
        assert read == {name: [digest] for name, digest in logical_digests(layer.weights).items()}


def test_replicas_are_compared(tmp_path, small_tiles):
    layer = Layer(tmp_path, 2, tp=2, ep=2)
    other, where = changed(layer.weights, random.Random(0), 5)
    layer.save(True)
    layer.save(True, weights=other, ep=1)
    _, found = unequal(layer.index)
    places: dict[str, set] = {}
    for one in found:
        positions = type("Found", (), {"positions": [(at.row, at.column) for at in one.positions]})
        for name, at in in_logical({one.a: positions}).items():
            places.setdefault(name, set()).update(at)
        assert all(at.b == 2 * at.a for at in one.positions)
    assert places == where


@pytest.mark.parametrize("stored", [False, True])
def test_wrong_elements_are_repaired_in_place(stored, tmp_path, small_tiles):
    (tmp_path / "b").mkdir()
    right, wrong = Layer(tmp_path, 0, 3), Layer(tmp_path / "b", 0, 2)
    right.save(stored)
    wrong.weights, _ = changed(right.weights, random.Random(1), 6)
    wrong.save(True)
    sides, checksums = (wrong.index, right.index), repair._Checksums()
    theirs = {tensor.name: tensor for tensor in sides[1].shards}
    for tensor in sides[0].shards:
        repair._rewrite(Pair(tensor, theirs[tensor.name]), *sides, checksums)
    checksums.renew()
    for rank, file in enumerate(sorted((tmp_path / "b").iterdir())):
        state = torch.load(file) if file.suffix == ".pt" else load_file(file)
        for name, (kind, _, key, _) in TENSORS.items():
            assert torch.equal(state[key], turned(cut(kind, right.weights[name], 2, rank), True))


@pytest.mark.parametrize("tp", [1, 2])
def test_elements_are_located_and_back(tp, tmp_path):
    layer = Layer(tmp_path, 4, tp)
    layer.save(True)
    checkpoint, draw = Located(tmp_path, layer.index), random.Random(0)
    for name, (kind, shape, key, _) in TENSORS.items():
        stored = [turned(cut(kind, layer.weights[name], tp, rank), True) for rank in range(tp)]
        for tensor in (
            tensor
            for tensor in checkpoint.index.shards
            if tensor.name in (name, *(name.replace("qkv", atom) for atom in "qkv"))
        ):
            first = HIDDEN * "qkv".index(tensor.name.split(".")[-2]) if kind == STACKED_QKV else 0
            index = [draw.randrange(size) for size in tensor.shape]
            (run,) = locate(checkpoint, f"{tensor.name}{index}")
            value = layer.weights[name][(index[0] + first, *index[1:])]
            assert (
                value_at(run.file, run.offset) == value
                and run.key.removeprefix("['").removesuffix("']") == key
            )
            assert stored[run.place.tp].reshape(-1)[run.element] == value
            (back,) = identify(checkpoint, Path(run.file), run.offset + 3).runs
            assert back == run
            runs = list(locate(checkpoint, tensor.name))
            assert sum(run.region.numel for run in runs) == tensor.rows * tensor.cols
            matrix = layer.weights[name].reshape(shape[0], -1)
            for run in runs:
                (row, col), (row_end, col_end) = run.region.offsets, run.region.ends
                expected = matrix[first + row : first + row_end, col:col_end]
                there = np.fromfile(run.file, "<u4", run.region.numel, offset=run.offset)
                assert np.array_equal(there, bits(expected).reshape(-1))
        for rank, tensor in enumerate(stored):
            low = draw.randrange(tensor.shape[0] - 1)
            found = list(locate(checkpoint, f"{key}[{low}:{low + 2}]", {"tp": rank}))
            values = np.concatenate(
                [np.fromfile(run.file, "<u4", run.region.numel, offset=run.offset) for run in found]
            )
            assert np.array_equal(values, bits(tensor[low : low + 2]).reshape(-1))


class Located:
    """What locating needs of a checkpoint."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index


def value_at(file: str, offset: int) -> float:
    return np.fromfile(file, "<f4", 1, offset=offset)[0]
