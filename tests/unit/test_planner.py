"""Matrices that lie in files cut in one way, wanted cut in another: planned, written, and compared
with numpy's slicing.

Real files and real bytes; buffers smaller than a row, holes that begin amid a row, blocks side by
side, casts, replicas."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from parammap.checkpoint.index import Index, StoredTensor, TensorEntry
from parammap.errors import RefusedError
from parammap.execute import gather, writer
from parammap.execute.writer import Outcome, Writer
from parammap.formats.frames import Hole, Literal
from parammap.plan.plan import Plan, Wanted, WantedFile
from parammap.plan.planner import FIRST, MEAN, OWN, REFUSE, Planner
from parammap.tensors.arrangement import SHARD_0
from parammap.tensors.digest import cells_digest
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import (
    ITEMSIZE,
    MAIN_PARAM,
    MODEL_PARAM,
    Extent,
    LogicalTensor,
    Stored,
    TensorSpec,
)
from parammap.tensors.region import Cells, Region
from parammap.tensors.shard import Shard
from parammap.tensors.view import View

SEEDS = pytest.mark.parametrize("seed", range(10))
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NUMPY = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}

Block = tuple[LogicalTensor | None, Region]


class Lab:
    """Matrices, the files that hold their tiles, and who holds which."""

    def __init__(self, folder: Path, seed: int, tp: int = 1) -> None:
        self.draw, self.folder, self.layout = random.Random(seed), folder, Layout(tp=tp)
        self.matrices: dict[LogicalTensor, np.ndarray] = {}
        self.held: list[StoredTensor] = []

    def matrix(
        self, rows: int, cols: int, role: str = MAIN_PARAM, dtype: str = "float32", name: str = "t"
    ) -> LogicalTensor:
        """Of random bits that are finite numbers; no two elements are equal in float32."""
        values = torch.randperm(
            rows * cols, generator=torch.Generator().manual_seed(self.draw.randrange(1 << 30))
        )
        tensor = LogicalTensor(role, name, dtype, (rows, cols))
        self.matrices[tensor] = bits((values - rows * cols // 3) * 0.37, dtype).reshape(rows, cols)
        return tensor

    def of(self, block: Block) -> np.ndarray:
        tensor, region = block
        if tensor is None:
            return np.zeros(region.sizes, np.uint32)
        return part(self.matrices[tensor], region)

    def store(
        self,
        blocks: list[Block],
        rank: int = 0,
        abreast: int = 1,
        content: np.ndarray | None = None,
    ) -> None:
        """Write one tensor that is these blocks, somewhere in one of three files; `content`: what
        it is instead."""
        dtype = blocks[0][0].dtype
        flat = self.side_by_side(blocks, abreast) if content is None else content
        path = self.folder / f"{self.draw.randrange(3)}.bin"
        with open(path, "ab") as file:
            file.write(self.draw.randbytes(self.draw.randrange(9)))
            extent = Extent(str(path), file.tell(), flat.nbytes)
            file.write(flat.tobytes())
        found = TensorEntry(
            "t", Place(tp=rank), blocks[0][0].state, Stored(dtype, (flat.size,), (extent,))
        )
        self.held.append(StoredTensor(found, "t", None, SHARD_0, laid(blocks, dtype, abreast)))

    def side_by_side(self, blocks: list[Block], abreast: int) -> np.ndarray:
        """The elements of blocks of which `abreast` at a time share their rows."""
        bands = [
            np.hstack([self.of(block) for block in blocks[start : start + abreast]])
            for start in range(0, len(blocks), abreast)
        ]
        return np.concatenate([band.reshape(-1) for band in bands])

    def tiles(self, region: Region, cuts: int) -> list[Region]:
        """The region, cut at random so many times."""
        tiles = [region]
        for _ in range(cuts):
            tile = tiles.pop(self.draw.randrange(len(tiles)))
            tiles += self.halves(tile)
        return tiles

    def halves(self, tile: Region) -> list[Region]:
        rows, cols = tile.sizes
        axis = 0 if rows > 1 and (self.draw.random() < 0.5 or cols == 1) else 1
        if tile.sizes[axis] == 1:
            return [tile]
        cut = self.draw.randrange(1, tile.sizes[axis])
        return [tile.narrow(axis, 0, cut), tile.narrow(axis, cut, tile.sizes[axis])]

    def bands(self, tensors: list[LogicalTensor], count: int) -> list[list[Block]]:
        """All of the tensors, which have the same rows, in runs of rows; in each, a box of each
        tensor, in some order."""
        rows = tensors[0].rows
        edges = [0, *sorted(self.draw.sample(range(1, rows), count - 1)), rows]
        return [
            [
                (tensor, Region((low, 0), (high - low, tensor.cols)))
                for tensor in self.draw.sample(tensors, len(tensors))
            ]
            for low, high in zip(edges, edges[1:], strict=False)
        ]

    def file(self, wanted: list[Wanted], rank: int) -> WantedFile:
        """An output file in which each tensor comes in several holes, cut at any element."""
        segments = []
        for number, one in enumerate(wanted):
            numel, itemsize = one.spec.shape[0], 4 if one.spec.dtype == "float32" else 2
            edges = [0, *sorted(self.draw.sample(range(1, numel), min(3, numel - 1))), numel]
            for low, high in zip(edges, edges[1:], strict=False):
                segments += [Hole(number, low * itemsize, (high - low) * itemsize), Literal(b"--")]
        return WantedFile("out", tuple(segments), tuple(wanted), Place(tp=rank))

    def convert(self, wanted: list[Wanted], replicas: str = OWN, rank: int = 0) -> Written:
        planner = Planner(Index(self.held, self.layout), {MAIN_PARAM: MODEL_PARAM}, replicas)
        plan, out = planner.plan([self.file(wanted, rank)]), BytesIO()
        outcome = Writer(plan.tasks[0], out, lambda nbytes: None).write()
        return Written(plan, outcome, tensors_in(out.getvalue(), plan))


class Written(NamedTuple):
    plan: Plan
    outcome: Outcome
    tensors: list[np.ndarray]


def tensors_in(content: bytes, plan: Plan) -> list[np.ndarray]:
    """The elements of each tensor of a file of Lab.file."""
    parts: dict[int, bytes] = {}
    for segment in plan.tasks[0].segments:
        if isinstance(segment, Hole):
            parts[segment.tensor] = parts.get(segment.tensor, b"") + content[: segment.nbytes]
        content = content[segment.nbytes :]
    assert not content
    return [
        np.frombuffer(part, NUMPY[spec.dtype])
        for spec, part in zip(plan.tasks[0].specs, parts.values(), strict=True)
    ]


def bits(values: torch.Tensor, dtype: str) -> np.ndarray:
    view = {4: torch.int32, 2: torch.int16}[TORCH[dtype].itemsize]
    return values.to(TORCH[dtype]).view(view).numpy().view(NUMPY[dtype]).copy()


def cast(elements: np.ndarray, source: str, target: str) -> np.ndarray:
    """By torch."""
    view = {4: np.int32, 2: np.int16}[elements.itemsize]
    return bits(torch.from_numpy(elements.view(view).copy()).view(TORCH[source]), target)


def whole(tensor: LogicalTensor) -> Region:
    return Region((0, 0), tensor.matrix)


def wanted(
    blocks: list[Block], dtype: str = "float32", abreast: int = 1, name: str = "out"
) -> Wanted:
    spec = TensorSpec(name, dtype, (sum(region.numel for _, region in blocks),))
    return Wanted(spec, laid(blocks, dtype, abreast))


def laid(blocks: list[Block], dtype: str, abreast: int = 1) -> tuple[Shard, ...]:
    """The blocks where they lie in a tensor in which `abreast` at a time share their rows."""
    shards, start, itemsize = [], 0, ITEMSIZE[dtype]
    for first in range(0, len(blocks), abreast):
        band = blocks[first : first + abreast]
        pitch, col = sum(region.sizes[1] for _, region in band), 0
        for tensor, region in band:
            view = View(
                "", (start + col) * itemsize, dtype, region.sizes, (pitch * itemsize, itemsize)
            )
            shards.append(Shard(tensor, region, view))
            col += region.sizes[1]
        start += pitch * band[0][1].sizes[0]
    return tuple(shards)


def digest(matrix: np.ndarray) -> int:
    return cells_digest(matrix, Cells(0, 0, (1,)))


@pytest.fixture(params=[(24, 0), (24, 1 << 20), (60, 8), (256, 12), (1 << 12, 1 << 12)], ids=str)
def buffers(request, monkeypatch) -> None:
    """Buffers of so many bytes, of which a row of most matrices here takes more, and gaps that are
    read along."""
    monkeypatch.setattr(writer, "BUFFER_BYTES", request.param[0])
    monkeypatch.setattr(gather, "BUFFER_BYTES", request.param[0])
    monkeypatch.setattr(gather, "GAP_BYTES", request.param[1])


def assert_all_digested(lab: Lab, written: Written, taken: np.ndarray | None = None) -> None:
    """Each element of each tensor, or of what was taken in its place, exactly once, at its own row
    and column."""
    expected = {
        (tensor, 0): (digest(matrix if taken is None else taken), matrix.size)
        for tensor, matrix in lab.matrices.items()
        if tensor.state == MAIN_PARAM
    }
    assert written.outcome.digests == expected
    assert written.plan.unused == []


@SEEDS
def test_any_tiling_from_any_tiling(tmp_path, buffers, seed):
    lab = Lab(tmp_path, seed)
    tensor = lab.matrix(lab.draw.randrange(1, 20), lab.draw.randrange(1, 40))
    for tile in lab.tiles(whole(tensor), lab.draw.randrange(8)):
        lab.store([(tensor, tile)])
    blocks: list[Block] = [
        (tensor, tile) for tile in lab.tiles(whole(tensor), lab.draw.randrange(8))
    ]
    blocks.insert(lab.draw.randrange(len(blocks) + 1), (None, Region((0, 0), (1, 5))))
    written = lab.convert([wanted(blocks)])
    assert np.array_equal(written.tensors[0], lab.side_by_side(blocks, 1))
    assert_all_digested(lab, written)


@SEEDS
@pytest.mark.parametrize(
    ("stored_as", "wanted_as"),
    [
        ("float32", "bfloat16"),
        ("float32", "float16"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
    ],
)
def test_casts_on_the_way(tmp_path, buffers, seed, stored_as, wanted_as):
    lab = Lab(tmp_path, seed)
    tensor = lab.matrix(7, 23, dtype=stored_as)
    for tile in lab.tiles(whole(tensor), 5):
        lab.store([(tensor, tile)])
    blocks: list[Block] = [(tensor, tile) for tile in lab.tiles(whole(tensor), 5)]
    written = lab.convert([wanted(blocks, wanted_as)])
    assert np.array_equal(
        written.tensors[0], cast(lab.side_by_side(blocks, 1), stored_as, wanted_as)
    )
    made = cast(lab.matrices[tensor].reshape(-1), stored_as, wanted_as)
    found = written.outcome.digests.pop((replace(tensor, dtype=wanted_as), 0))
    assert found == (digest(made.reshape(tensor.matrix)), made.size)
    assert_all_digested(lab, written)


@SEEDS
def test_blocks_side_by_side_at_either_end(tmp_path, buffers, seed):
    """Three matrices of as many rows, woven into bands at the source, into others in the output, or
    one after another."""
    lab = Lab(tmp_path, seed)
    tensors = [lab.matrix(12, lab.draw.randrange(1, 17), name=name) for name in "abc"]
    for band in lab.bands(tensors, lab.draw.randrange(1, 5)):
        abreast = lab.draw.choice([1, 3])
        lab.store(band, abreast=abreast)
    blocks = [block for band in lab.bands(tensors, lab.draw.randrange(1, 5)) for block in band]
    order = [block for tensor in tensors for block in blocks if block[0] == tensor]
    written = lab.convert([wanted(blocks, abreast=3), wanted(order, name="one after another")])
    assert np.array_equal(written.tensors[0], lab.side_by_side(blocks, 3))
    assert np.array_equal(written.tensors[1], lab.side_by_side(order, 1))
    assert_all_digested(lab, written)


@SEEDS
def test_the_same_bands_at_both_ends(tmp_path, buffers, seed):
    lab = Lab(tmp_path, seed)
    tensors = [lab.matrix(6, lab.draw.randrange(1, 9), name=name) for name in "ab"]
    blocks = [block for band in lab.bands(tensors, 3) for block in band]
    lab.store(blocks, abreast=2)
    written = lab.convert([wanted(blocks, abreast=2)])
    assert np.array_equal(written.tensors[0], lab.side_by_side(blocks, 2))
    assert_all_digested(lab, written)


def flipped(lab: Lab, matrix: np.ndarray, count: int) -> tuple[np.ndarray, set[tuple[int, int]]]:
    """The matrix with some elements changed, and where."""
    result, where = matrix.copy(), set()
    for number in lab.draw.sample(range(matrix.size), count):
        where.add(divmod(number, matrix.shape[1]))
        result.reshape(-1)[number] ^= 0x0010 if matrix.itemsize == 2 else 0x00100000
    return result, where


@SEEDS
def test_model_copies_are_compared_at_the_right_elements(tmp_path, buffers, seed, monkeypatch):
    monkeypatch.setattr("parammap.execute.checks.SHOWN_POSITIONS", 1000)
    lab = Lab(tmp_path, seed)
    tensor = lab.matrix(9, 20)
    copy = LogicalTensor(MODEL_PARAM, "t", "bfloat16", tensor.shape)
    model = cast(lab.matrices[tensor].reshape(-1), "float32", "bfloat16").reshape(tensor.shape)
    lab.matrices[copy], where = flipped(lab, model, 7)
    tiles = lab.tiles(whole(tensor), lab.draw.randrange(6))
    for tile in tiles:
        lab.store([(tensor, tile)])
    for tile in tiles if seed % 2 else lab.tiles(whole(tensor), lab.draw.randrange(6)):
        lab.store([(copy, tile)])
    written = lab.convert(
        [wanted([(tensor, tile) for tile in lab.tiles(whole(tensor), lab.draw.randrange(6))])]
    )
    misfit = written.outcome.misfits[tensor]
    assert misfit.count == 7 and {(row, col) for row, col, *_ in misfit.positions} == where
    assert_all_digested(lab, written)


@SEEDS
def test_copies_are_compared_at_the_right_elements(tmp_path, buffers, seed, monkeypatch):
    """Three ranks keep copies, in the same tiles or each in its own; the second's and the third's
    differ in elements."""
    monkeypatch.setattr("parammap.execute.checks.SHOWN_POSITIONS", 1000)
    lab = Lab(tmp_path, seed, tp=3)
    tensor = lab.matrix(9, 20)
    copies = [lab.matrices[tensor]]
    others = [flipped(lab, copies[0], 5) for _ in range(2)]
    copies += [copy for copy, _ in others]
    tiles = lab.tiles(whole(tensor), lab.draw.randrange(6))
    for rank, copy in enumerate(copies):
        for tile in tiles if seed % 2 else lab.tiles(whole(tensor), lab.draw.randrange(6)):
            lab.store([(tensor, tile)], rank, content=part(copy, tile).reshape(-1))
    blocks: list[Block] = [
        (tensor, tile) for tile in lab.tiles(whole(tensor), lab.draw.randrange(6))
    ]
    for replicas in (REFUSE, FIRST, MEAN):
        written = lab.convert([wanted(blocks), wanted(blocks[::-1], name="again")], replicas)
        taken = mean(copies) if replicas == MEAN else copies[0]
        for tensors, order in zip(written.tensors, (blocks, blocks[::-1]), strict=True):
            assert np.array_equal(
                tensors, np.concatenate([part(taken, region).reshape(-1) for _, region in order])
            )
        found = written.outcome.unequal[tensor]
        assert {(row, col) for row, col, *_ in found.positions} == others[0][1] | others[1][1]
        assert found.count == (
            20 if replicas == MEAN else 10
        )  # a mean needs them in both of the output's tensors
        assert_all_digested(lab, written, taken)
    for rank, copy in enumerate(copies):
        written = lab.convert([wanted(blocks)], OWN, rank)
        assert np.array_equal(
            written.tensors[0],
            np.concatenate([part(copy, region).reshape(-1) for _, region in blocks]),
        )
        assert not written.outcome.unequal
        assert written.outcome.digests == {(tensor, rank): (digest(copy), copy.size)}


def part(matrix: np.ndarray, region: Region) -> np.ndarray:
    (row, col), (row_end, col_end) = region.offsets, region.ends
    return matrix[row:row_end, col:col_end]


def mean(copies: list[np.ndarray]) -> np.ndarray:
    return (
        np.mean([copy.view(np.float32).astype(np.float64) for copy in copies], axis=0)
        .astype(np.float32)
        .view(np.uint32)
    )


# ------------------------------------------------------------------------------------------------------------
# refusals


def halves(lab: Lab) -> tuple[LogicalTensor, list[Region]]:
    return lab.matrix(4, 6), [Region((0, 0), (4, 3)), Region((0, 3), (4, 3))]


def cases_of_coverage(lab: Lab) -> Iterator[tuple[list[Region], list[Region], str]]:
    """What is stored, what is wanted, what is said."""
    _, (left, right) = halves(lab)
    yield [left], [left, right], "does not hold"
    yield [left, right], [left, right, left], "source elements for shape"
    yield [left, right], [left], "source elements for shape"


@pytest.mark.parametrize("case", range(3))
def test_an_element_left_out_or_written_twice_is_refused(tmp_path, case):
    lab = Lab(tmp_path, 0)
    tensor, _ = halves(lab)
    stored, blocks, said = list(cases_of_coverage(lab))[case]
    for region in stored:
        lab.store([(tensor, region)])
    with pytest.raises(RefusedError, match=said):
        lab.convert(
            [
                Wanted(
                    TensorSpec("out", "float32", (24,)),
                    laid([(tensor, region) for region in blocks], "float32"),
                )
            ]
        )


def test_parts_that_overlap_are_refused(tmp_path):
    """As many elements as the tensor has, but the second half where the first one is."""
    lab = Lab(tmp_path, 0)
    tensor, (left, right) = halves(lab)
    lab.store([(tensor, whole(tensor))])
    parts = laid([(tensor, left), (tensor, right)], "float32")
    for wrong in (
        (parts[0], parts[1].at("", -8)),
        (parts[0], replace(parts[1], view=parts[0].view)),
    ):
        with pytest.raises(RefusedError, match="leave out or repeat elements"):
            lab.convert([Wanted(TensorSpec("out", "float32", (24,)), wrong)])


def test_an_element_written_twice_in_place_of_another_leaves_that_one_unused(tmp_path):
    lab = Lab(tmp_path, 0)
    tensor, (left, right) = halves(lab)
    for region in (left, right):
        lab.store([(tensor, region)])
    assert lab.convert([wanted([(tensor, left), (tensor, left)])]).plan.unused == ["t (weight)"]
    assert lab.convert([wanted([(tensor, right), (tensor, left)])]).plan.unused == []


# ------------------------------------------------------------------------------------------------
# completeness


@SEEDS
@pytest.mark.parametrize(
    "fault", ["none", "a tile is missing", "a file ends early", "one overlaps"]
)
def test_an_index_is_complete_only_if_each_element_is_held_once(fault, seed, tmp_path):
    lab = Lab(tmp_path, seed)
    tensor = lab.matrix(lab.draw.randint(8, 40), lab.draw.randint(8, 40))
    for tile in lab.tiles(Region((0, 0), tensor.matrix), 5):
        lab.store([(tensor, tile)])
    last = lab.held[-1]
    if fault == "a tile is missing":
        lab.held.pop()
    elif fault == "a file ends early":
        stored = last.found.stored
        (extent,) = stored.extents
        short = replace(stored, extents=(replace(extent, nbytes=extent.nbytes - 4),))
        lab.held[-1] = replace(last, found=replace(last.found, stored=short))
    elif fault == "one overlaps":
        (region,) = [one.parts[0].region for one in lab.held[:1]]
        lab.held.pop()
        lab.store([(tensor, Region(region.offsets, last.parts[0].region.sizes))])
    index = Index(lab.held, lab.layout)
    if fault == "none":
        index.check_complete()
    else:
        with pytest.raises(RefusedError, match="do not make up its shape"):
            index.check_complete()
