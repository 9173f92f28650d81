"""What the tests of test_transposed_source share with others."""

from __future__ import annotations

import itertools
import random
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from parammap.checkpoint.index import Index, NameResolver, TensorEntry, atoms
from parammap.execute import gather, writer
from parammap.execute.writer import Outcome, Writer
from parammap.families import HF_GPT2, MERAK_CUT
from parammap.formats import safetensors, torch_zip
from parammap.formats.frames import Hole
from parammap.plan.plan import Plan, Wanted, WantedFile
from parammap.plan.planner import OWN, Planner
from parammap.tensors.arrangement import SHARD_0, SHARD_1, STACKED_QKV, Sizes, arranged, local_shape
from parammap.tensors.digest import cells_digest
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import MAIN_PARAM, MODEL_PARAM, LogicalTensor, Stored, TensorSpec
from parammap.tensors.region import Cells
from parammap.tensors.shard import Shard, transposed

HEADS, HIDDEN, INNER = 12, 24, 60

SIZES = Sizes(heads=HEADS, groups=HEADS)

#: canonical name: how it is cut, logical shape, transformers' name, Merak's name on several ranks
TENSORS = {
    "layers.0.attention.qkv.weight": (
        STACKED_QKV,
        (3 * HIDDEN, HIDDEN),
        "h.0.attn.c_attn.weight",
        "h.0.attn.c_attn.col_linear.weight",
    ),
    "layers.0.attention.out.weight": (
        SHARD_1,
        (HIDDEN, HIDDEN),
        "h.0.attn.c_proj.weight",
        "h.0.attn.c_proj.row_linear.weight",
    ),
    "layers.0.mlp.fc1.weight": (
        SHARD_0,
        (INNER, HIDDEN),
        "h.0.mlp.c_fc.weight",
        "h.0.mlp.c_fc.col_linear.weight",
    ),
    "layers.0.mlp.fc1.bias": (
        SHARD_0,
        (INNER,),
        "h.0.mlp.c_fc.bias",
        "h.0.mlp.c_fc.col_linear.bias",
    ),
    "layers.0.mlp.fc2.weight": (
        SHARD_1,
        (HIDDEN, INNER),
        "h.0.mlp.c_proj.weight",
        "h.0.mlp.c_proj.row_linear.weight",
    ),
}

#: whether the source and the output hold matrices transposed
WAYS = pytest.mark.parametrize(
    ("stored", "wants"), [(True, False), (False, True), (True, True), (False, False)]
)


@pytest.fixture(params=[(48, 480, 0), (400, 4000, 80), (1 << 12, 1 << 12, 1 << 12)], ids=str)
def buffers(request, monkeypatch):
    """Buffers that even small matrices do not fit."""
    buffer, strip, gap = request.param
    for module, name, size in (
        (writer, "BUFFER_BYTES", buffer),
        (gather, "BUFFER_BYTES", buffer),
        (writer, "STRIP_BYTES", strip),
        (gather, "GAP_BYTES", gap),
    ):
        monkeypatch.setattr(module, name, size)


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(tensor: torch.Tensor) -> np.ndarray:
    return (
        tensor.contiguous()
        .view({4: torch.int32, 2: torch.int16}[tensor.itemsize])
        .numpy()
        .view({4: np.uint32, 2: np.uint16}[tensor.itemsize])
    )


def cut(kind: str, whole: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    """A rank's part, by torch."""
    if kind == STACKED_QKV:
        return torch.cat([part.chunk(tp)[rank] for part in whole.chunk(3)])
    return whole.chunk(tp, dim={SHARD_0: 0, SHARD_1: 1}[kind])[rank]


def turned(tensor: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    return tensor.t().contiguous() if is_transposed and tensor.ndim == 2 else tensor.contiguous()


class Layer:
    """The layer's weights, the files that hold them, and who holds which."""

    def __init__(self, folder: Path, seed: int = 0, tp: int = 1, ep: int = 1) -> None:
        self.folder, self.layout, self.framework, self.held = (
            folder,
            Layout(tp=tp, ep=ep),
            "test",
            [],
        )
        self.weights = {
            name: drawn(shape, seed + number)
            for number, (name, (_, shape, *_)) in enumerate(TENSORS.items())
        }

    def save(
        self,
        is_transposed: bool,
        role: str = MAIN_PARAM,
        weights: dict[str, torch.Tensor] | None = None,
        ep: int = 0,
    ) -> None:
        dialect = HF_GPT2 if is_transposed else MERAK_CUT
        naming = NameResolver(dialect, self.layout, None, None, SIZES, False)
        for rank in range(self.layout.tp):
            state = {
                names[not is_transposed]: turned(
                    cut(kind, (weights or self.weights)[name], self.layout.tp, rank), is_transposed
                )
                for name, (kind, _, *names) in TENSORS.items()
            }
            for name, stored in self._written(state, f"{role}.{rank}.{ep}").items():
                self.held.append(
                    naming.hold(TensorEntry(name, Place(tp=rank, ep=ep), role, stored))
                )

    def _written(self, state: dict[str, torch.Tensor], name: str) -> dict[str, Stored]:
        path = self.folder / name
        if len(self.held) % 2:
            torch.save(state, f"{path}.pt")
            return torch_zip.read(f"{path}.pt")
        save_file(state, f"{path}.safetensors")
        return safetensors.read(f"{path}.safetensors")

    @property
    def index(self) -> Index:
        return Index(self.held, self.layout)


def wanted(
    name: str,
    is_transposed: bool,
    tp: int = 1,
    rank: int = 0,
    kind: str | None = None,
    dtype: str = "float32",
) -> Wanted:
    own, whole, *_ = TENSORS[name]
    shape = local_shape(kind or own, whole, tp, SIZES)
    parts = atoms(
        MAIN_PARAM, name, kind or own, "float32", arranged(kind or own, shape, tp, rank, SIZES)
    )
    return laid(name, shape, parts, is_transposed, dtype)


def laid(
    name: str,
    shape: tuple[int, ...],
    parts: tuple[Shard, ...],
    is_transposed: bool,
    dtype: str = "float32",
) -> Wanted:
    is_turned = is_transposed and len(shape) == 2
    return Wanted(
        TensorSpec(name, dtype, shape[::-1] if is_turned else shape),
        transposed(parts, shape) if is_turned else parts,
    )


def written(
    index: Index,
    tensors: list[Wanted],
    replicas: str = OWN,
    draw: random.Random | None = None,
    ep: int = 0,
) -> tuple[list[np.ndarray], Outcome, Plan]:
    """What the writer makes of them, in holes that are cut at any element."""
    segments = []
    for number, one in enumerate(tensors):
        itemsize, nbytes = one.spec.nbytes // int(np.prod(one.spec.shape)), one.spec.nbytes
        edges = sorted(
            {
                0,
                nbytes,
                *(itemsize * draw.randrange(nbytes // itemsize) for _ in range(3 if draw else 0)),
            }
        )
        segments += [Hole(number, low, high - low) for low, high in itertools.pairwise(edges)]
    files = [WantedFile("out", tuple(segments), tuple(tensors), Place(ep=ep))]
    plan = Planner(index, {MAIN_PARAM: MODEL_PARAM}, replicas).plan(files)
    out = BytesIO()
    outcome = Writer(plan.tasks[0], out, lambda nbytes: None).write()
    content, result = out.getvalue(), []
    for one in tensors:
        dtype = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}[one.spec.dtype]
        result.append(np.frombuffer(content[: one.spec.nbytes], dtype).reshape(one.spec.shape))
        content = content[one.spec.nbytes :]
    return result, outcome, plan


def logical_digests(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """Of each atom, as it is in [out, in]."""
    result = {}
    for name, weight in weights.items():
        is_fused = TENSORS[name][0] == STACKED_QKV
        for atom, part in zip("qkv", weight.chunk(3), strict=True) if is_fused else [("", weight)]:
            matrix = bits(part).reshape(part.shape[0], -1)
            result[name.replace("qkv", atom) if is_fused else name] = cells_digest(
                matrix, Cells(0, 0, (1,))
            )
    return result


def changed(
    weights: dict[str, torch.Tensor], draw: random.Random, count: int
) -> tuple[dict, dict[str, set]]:
    """Copies with some elements of each matrix doubled, and where."""
    copies, where = {name: weight.clone() for name, weight in weights.items()}, {}
    for name, copy in copies.items():
        if copy.ndim == 2:
            at = draw.sample(
                list(itertools.product(range(copy.shape[0]), range(copy.shape[1]))), count
            )
            where[name] = set(at)
            for row, col in at:
                copy[row, col] *= 2
    return copies, where


def in_logical(found: dict[LogicalTensor, object]) -> dict[str, set[tuple[int, int]]]:
    """The positions found, those of q, k and v in the fused tensor."""
    result: dict[str, set] = {}
    for tensor, one in found.items():
        *path, atom, w = tensor.name.split(".")
        is_fused = atom in ("q", "k", "v")
        name = ".".join([*path, "qkv", w]) if is_fused else tensor.name
        first = "qkv".index(atom) * HIDDEN if is_fused else 0
        result.setdefault(name, set()).update((row + first, col) for row, col, *_ in one.positions)
    return result
