"""Tensors that are written as the transpose of what the source holds: strip by strip, equal to
numpy's own transpose."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parammap.checkpoint.index import Index, StoredTensor, TensorEntry, atoms
from parammap.execute import gather, writer
from parammap.execute.checks import cast_bits
from parammap.execute.writer import Writer
from parammap.formats.frames import Hole
from parammap.plan.plan import Wanted, WantedFile, in_a_row, interleaved
from parammap.plan.planner import Planner
from parammap.tensors.arrangement import SHARD_0, SHARD_1, arranged
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
from parammap.tensors.region import Cells
from parammap.tensors.shard import transposed, whole_of


def random(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Source:
    """Matrices cut over ranks along one dimension, or over files at any element, and an index of
    them."""

    def __init__(self, folder: Path, tp: int = 1) -> None:
        self.folder, self.layout, self.held = folder, Layout(tp=tp), []

    def cut(
        self,
        name: str,
        matrix: np.ndarray,
        kind: str,
        role: str = MAIN_PARAM,
        dtype: str = "float32",
    ) -> None:
        """One file per rank, each with a piece of the matrix behind some other bytes."""
        for rank, piece in enumerate(
            np.split(matrix, self.layout.tp, axis={SHARD_0: 0, SHARD_1: 1}[kind])
        ):
            self._hold(name, piece.shape, kind, role, dtype, rank, [piece.tobytes()])

    def shard(self, name: str, matrix: np.ndarray, edges: list[int]) -> None:
        """One file for each run of elements between the edges."""
        runs = np.split(matrix.reshape(-1), edges)
        self._hold(
            name,
            matrix.shape,
            SHARD_0,
            MAIN_PARAM,
            "float32",
            0,
            [run.tobytes() for run in runs if len(run)],
        )

    def _hold(self, name, shape, kind, role, dtype, rank, contents) -> None:
        extents = []
        for number, content in enumerate(contents):
            file = self.folder / f"{name}.{role}.{rank}.{number}"
            file.write_bytes(b"\xff" * 7 + content)
            extents.append(Extent(str(file), 7, len(content)))
        found = TensorEntry(name, Place(tp=rank), role, Stored(dtype, shape, tuple(extents)))
        parts = arranged(kind, shape, self.layout.tp, rank, dtype=dtype)
        self.held.append(
            StoredTensor(found, name, None, kind, atoms(role, name, kind, dtype, parts))
        )

    def written(
        self, wanted: Wanted, holes: list[int] = (), model_copies: dict | None = None
    ) -> tuple[np.ndarray, writer.Outcome]:
        """What the writer makes of it, in holes that end at these bytes."""
        edges = [0, *holes, wanted.spec.nbytes]
        segments = tuple(
            Hole(0, low, high - low)
            for low, high in zip(edges, edges[1:], strict=False)
            if high > low
        )
        plan = Planner(Index(self.held, self.layout), model_copies or {}).plan(
            [WantedFile("out", segments, (wanted,))]
        )
        out = io.BytesIO()
        outcome = Writer(plan.tasks[0], out, lambda nbytes: None).write()
        assert not plan.unused
        return np.frombuffer(out.getvalue(), wanted.spec.dtype).reshape(wanted.spec.shape), outcome


def turned(*names: str, shape: tuple[int, int], dtype: str = "float32") -> Wanted:
    rows, cols = shape
    spec = TensorSpec("out", dtype, (cols, rows * len(names)))
    return Wanted(
        spec,
        interleaved(
            [(whole_of(LogicalTensor(MAIN_PARAM, name, "float32", shape)),) for name in names]
        ),
    )


@pytest.fixture
def small_buffers(monkeypatch):
    """Buffers that even small matrices do not fit."""
    monkeypatch.setattr(writer, "BUFFER_BYTES", 400)
    monkeypatch.setattr(writer, "STRIP_BYTES", 4000)
    monkeypatch.setattr(gather, "BUFFER_BYTES", 400)
    monkeypatch.setattr(gather, "GAP_BYTES", 80)


@pytest.mark.parametrize("kind", [SHARD_0, SHARD_1])
@pytest.mark.parametrize("tp", [1, 2, 5])
@pytest.mark.parametrize("shape", [(60, 40), (10, 500), (3000, 10), (10, 10)])
def test_a_matrix_cut_over_ranks(kind, tp, shape, tmp_path, small_buffers):
    source, matrix = Source(tmp_path, tp), random(shape)
    source.cut("w", matrix, kind)
    result, outcome = source.written(turned("w", shape=shape))
    assert np.array_equal(result, matrix.T)
    ((digest, count),) = outcome.digests.values()
    assert (
        digest == cells_digest(matrix.view(np.uint32), Cells(0, 0, (1,))) and count == matrix.size
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    edges=st.lists(st.integers(0, 1600), max_size=6),
    holes=st.lists(st.integers(0, 4800), max_size=5),
    count=st.integers(1, 3),
)
def test_shards_cut_at_any_element_and_holes_at_any_byte(
    tmp_path_factory, rows, cols, edges, holes, count
):
    source = Source(tmp_path_factory.mktemp("source"))
    matrices = [random((rows, cols), seed) for seed in range(count)]
    for name, matrix in zip("qkv", matrices, strict=False):
        source.shard(name, matrix, sorted(min(edge, matrix.size) for edge in edges))
    total = rows * cols * count
    ends = sorted({4 * (hole % total) for hole in holes})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "BUFFER_BYTES", 96)
        patch.setattr(gather, "BUFFER_BYTES", 96)
        patch.setattr(writer, "STRIP_BYTES", 512)
        result, outcome = source.written(turned(*"qkv"[:count], shape=(rows, cols)), ends)
    assert np.array_equal(
        result, np.stack([matrix.T for matrix in matrices], axis=-1).reshape(cols, rows * count)
    )
    for name, matrix in zip("qkv", matrices, strict=False):
        digest, numel = next(
            value for (tensor, _), value in outcome.digests.items() if tensor.name == name
        )
        assert (
            digest == cells_digest(matrix.view(np.uint32), Cells(0, 0, (1,)))
            and numel == matrix.size
        )


def test_three_vectors_are_interleaved(tmp_path):
    source, vectors = Source(tmp_path, 2), [random((8,), seed) for seed in range(3)]
    for name, vector in zip("qkv", vectors, strict=True):
        source.cut(name, vector, SHARD_0)
    spec = TensorSpec("out", "float32", (24,))
    panels = [(whole_of(LogicalTensor(MAIN_PARAM, name, "float32", (8,))),) for name in "qkv"]
    result, _ = source.written(Wanted(spec, interleaved(panels)))
    assert np.array_equal(result, np.stack(vectors, axis=1).reshape(-1))


def test_bands_go_one_below_the_other(tmp_path, small_buffers):
    source, parts = Source(tmp_path), [random((rows, 30), rows) for rows in (20, 5)]
    for name, part in zip("ab", parts, strict=True):
        source.cut(name, part, SHARD_0)
    shards = in_a_row(
        whole_of(LogicalTensor(MAIN_PARAM, name, "float32", part.shape))
        for name, part in zip("ab", parts, strict=True)
    )
    result, _ = source.written(
        Wanted(TensorSpec("out", "float32", (30, 25)), transposed(shards, (25, 30)))
    )
    assert np.array_equal(result, np.concatenate(parts).T)


def test_values_are_cast_on_the_way(tmp_path, small_buffers):
    source, matrix = Source(tmp_path, 2), random((60, 40))
    source.cut("w", matrix, SHARD_0)
    result, _ = source.written(turned("w", shape=(60, 40), dtype="float16"))
    assert np.array_equal(result.view(np.uint16), matrix.T.astype(np.float16).view(np.uint16))


def test_the_models_own_copy_is_compared(tmp_path, small_buffers):
    source, matrix = Source(tmp_path, 2), random((60, 40))
    model = cast_bits(matrix.view(np.uint32), "bfloat16")
    model[37, 21] += 1
    source.cut("w", matrix, SHARD_1)
    source.cut("w", model, SHARD_1, MODEL_PARAM, "bfloat16")
    result, outcome = source.written(
        turned("w", shape=(60, 40)), model_copies={MAIN_PARAM: MODEL_PARAM}
    )
    (misfit,) = outcome.misfits.values()
    assert np.array_equal(result, matrix.T)
    assert misfit.count == 1 and misfit.positions[0][:2] == (37, 21)


def test_memory_does_not_grow_with_the_matrix(tmp_path, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(writer, "STRIP_BYTES", 1 << 20)
    source, matrix = Source(tmp_path), random((4000, 3000))
    source.cut("w", matrix, SHARD_0)
    wanted = turned("w", shape=(4000, 3000))
    plan = Planner(Index(source.held, source.layout)).plan(
        [WantedFile("out", (Hole(0, 0, matrix.nbytes),), (wanted,))]
    )
    with open(tmp_path / "out", "wb") as out:
        tracemalloc.start()
        Writer(plan.tasks[0], out, lambda nbytes: None).write()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 6 << 20 < matrix.nbytes
    assert np.array_equal(np.fromfile(tmp_path / "out", np.float32).reshape(3000, 4000), matrix.T)
