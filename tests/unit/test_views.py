"""Views, shards and arrangements against numpy's own strides: indices, bytes, and how fused tensors
are taken apart."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parammap.tensors.arrangement import (
    EXPERTS_FC1,
    EXPERTS_FC2,
    GATE_UP,
    KVQ,
    QK,
    QKV,
    SHARD_0,
    SHARD_1,
    STACKED_QKV,
    VOCAB,
    Sizes,
    arranged,
)
from parammap.tensors.logical import MAIN_PARAM, LogicalTensor
from parammap.tensors.region import Region, covers_once
from parammap.tensors.shard import Shard, fitted, whole_of
from parammap.tensors.view import View, row_major

SIZES = Sizes(heads=8, groups=4, vocab=21)


@st.composite
def views(draw) -> View:
    """Up to three axes in any order of their strides, with gaps between what lies side by side."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    strides, stride = [0] * len(shape), 4
    for axis in draw(st.permutations(range(len(shape)))):
        strides[axis] = stride
        stride = stride * shape[axis] + 4 * draw(st.integers(0, 2))
    return View("", 4 * draw(st.integers(0, 3)), "float32", shape, tuple(strides))


def places(view: View) -> np.ndarray:
    """The byte at which each element begins; of the view's shape."""
    grid = np.indices(view.shape).reshape(len(view.shape), -1)
    return (view.offset + np.array(view.strides) @ grid).reshape(view.shape)


def elements(view: View, box: Region) -> np.ndarray:
    return places(view)[
        tuple(slice(low, end) for low, end in zip(box.offsets, box.ends, strict=True))
    ]


@settings(max_examples=300, deadline=None)
@given(view=views(), low=st.integers(0, 250), length=st.integers(0, 250))
def test_what_lies_within_bytes(view, low, length):
    boxes, there = list(view.within(low, low + length)), places(view)
    found = [byte for box in boxes for byte in elements(view, box).reshape(-1)]
    assert sorted(found) == sorted(there[(there >= low) & (there + 4 <= low + length)])
    assert len(boxes) <= 2 * len(view.shape) - 1 and all(
        np.array_equal(places(view.narrow(box)), elements(view, box)) for box in boxes
    )


@settings(max_examples=200, deadline=None)
@given(view=views())
def test_runs_and_bytes_lead_back_to_elements(view):
    there, runs = places(view), [view.narrow(box) for box in view.runs()]
    assert [places(run).reshape(-1).tolist() for run in runs] == [
        list(range(run.offset, run.offset + run.span, 4)) for run in runs
    ]
    assert sorted(byte for run in runs for byte in places(run).reshape(-1)) == sorted(
        there.reshape(-1)
    )
    for byte in range(view.offset - 4, view.offset + view.span + 4):
        index = view.index_at(byte)
        expected = np.argwhere((there <= byte) & (byte < there + 4))
        assert (index is None) == (not len(expected)) and (
            index is None or list(index) == expected[0].tolist()
        )


@pytest.mark.parametrize("seed", range(20))
def test_shards_that_group_rows_otherwise_are_cut_to_fit(seed):
    """Groups of any number of rows, at three ends; each row and column turns up once, and means the
    same at each end."""
    draw, cols = random.Random(seed), 3
    tensor = LogicalTensor(MAIN_PARAM, "t", "float32", (48, cols))
    shards = []
    for _ in range(3):
        period = draw.choice([1, 2, 3, 4, 6, 12, 16, 48])
        gap = draw.randrange(3)
        view = View(
            "", 0, "float32", (48 // period, period, cols), ((period * cols + gap) * 4, cols * 4, 4)
        )
        shards.append(
            Shard(tensor, Region((0, 0), (48, cols)), view).cut(Region((0, 0, 0), view.shape))
        )
    low = draw.randrange(48)
    region = Region((low, 1), (draw.randrange(1, 49 - low), cols - 1))
    parts = list(fitted(region, shards))
    for part, views in parts:
        assert len({view.shape for view in views}) == 1
        for shard, view in zip(shards, views, strict=True):
            (row, col), (row_end, col_end) = part.offsets, part.ends
            expected = [
                [shard.place_of(r, c) for c in range(col, col_end)] for r in range(row, row_end)
            ]
            assert places(view).reshape(part.sizes).tolist() == expected
    assert covers_once(
        [Region((part.offsets[0] - low, part.offsets[1] - 1), part.sizes) for part, _ in parts],
        region.sizes,
    )


# --------------------------------------------------------------------------------------------------------
# arrangements


def by_groups(parts: dict[str, np.ndarray], groups: int) -> np.ndarray:
    """The rows of one group of each part, then of the next."""
    split = [matrix.reshape(groups, -1, matrix.shape[1]) for matrix in parts.values()]
    return np.concatenate(split, axis=1).reshape(-1, split[0].shape[2])


def fused(kind: str, parts: dict[str, np.ndarray], tp: int, rank: int) -> np.ndarray:
    """A rank's tensor, by numpy."""
    if kind in (QKV, QK):
        return np.split(by_groups(parts, SIZES.groups), tp)[rank]
    if kind == VOCAB:
        return np.split(np.concatenate(list(parts.values())), tp)[rank]
    if kind in (EXPERTS_FC1, SHARD_1):
        mine = [np.split(matrix, tp, axis=1)[rank] for matrix in parts.values()]
        if kind == SHARD_1:
            return mine[0]
        pairs = [
            np.concatenate(mine[number : number + 2], axis=1) for number in range(0, len(mine), 2)
        ]
        return np.stack(pairs).reshape(mine[0].shape[0], -1)
    return np.concatenate([np.split(matrix, tp)[rank] for matrix in parts.values()])


ROWS_OF = {
    QKV: {"q": 48, "k": 24, "v": 24},
    QK: {"q": 48, "k": 24},
    STACKED_QKV: dict.fromkeys("qkv", 24),
    KVQ: dict.fromkeys("kvq", 24),
    GATE_UP: {"gate": 12, "up": 12},
    VOCAB: {"": 21, "padding": 3},
    SHARD_0: {"": 24},
    SHARD_1: {"": 8},
    EXPERTS_FC1: {f"{e}.{part}": 8 for e in (4, 5) for part in ("gate", "up")},
    EXPERTS_FC2: {"4.fc2": 12, "5.fc2": 12},
}


@pytest.mark.parametrize(
    ("kind", "tp"),
    [
        (kind, tp)
        for kind in ROWS_OF
        for tp in (1, 2, 4, 8)
        if tp < 8 or kind not in (GATE_UP, EXPERTS_FC2)
    ],
)
def test_arrangements_are_numpys_slices(kind, tp):
    """Of whole matrices of distinct numbers; also where ranks end amid a group."""
    check_slices(kind, tp, ROWS_OF[kind], SIZES.heads if kind == STACKED_QKV else SIZES.groups)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_stacked_heads_may_share_keys_and_values(tp):
    check_slices(STACKED_QKV, tp, ROWS_OF[QKV], SIZES.groups)


def check_slices(kind, tp, rows_of, groups):
    sizes = Sizes(SIZES.heads, groups, SIZES.vocab, experts=8, gated=True)
    parts = {
        name: np.arange(rows * 16, dtype=np.uint32).reshape(rows, 16) + 1000 * number
        for number, (name, rows) in enumerate(rows_of.items())
    }
    seen = {name: np.zeros(part.shape, int) for name, part in parts.items()}
    for rank in range(tp):
        there = fused(kind, parts, tp, rank)
        for part in arranged(kind, there.shape, tp, rank, sizes, range(4, 6)):
            assert part.shape == parts[part.name].shape
            (row, col), (row_end, col_end) = part.region.offsets, part.region.ends
            bits = np.ndarray(
                part.view.shape,
                np.uint32,
                np.ascontiguousarray(there),
                part.view.offset,
                part.view.strides,
            )
            assert np.array_equal(
                bits.reshape(part.region.sizes), parts[part.name][row:row_end, col:col_end]
            )
            seen[part.name][row:row_end, col:col_end] += 1
    assert all((count == 1).all() for count in seen.values())


def test_a_rank_has_one_view_of_each_part_however_many_heads():
    parts = arranged(QKV, (96 * 3 * 128 // 8, 1024), 8, 3, Sizes(96, 96))
    assert [(part.name, part.region, part.view.shape) for part in parts] == [
        (name, Region((3 * 12 * 128, 0), (12 * 128, 1024)), (12, 128, 1024)) for name in "qkv"
    ]


def test_a_contiguous_view_is_one_run():
    tensor = LogicalTensor(MAIN_PARAM, "t", "bfloat16", (6, 5, 4))
    (view,) = [whole_of(tensor).view]
    assert view == row_major((6, 20), "bfloat16") and view.span == 2 * math.prod(tensor.shape)
    assert len(list(view.runs())) == 1
