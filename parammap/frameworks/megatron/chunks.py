"""Megatron-core's sharded tensors: which box of which layer's (and expert's) tensor a chunk is.

A key names a tensor of the whole model. Layers, and the experts in them, are stacked:
`decoder.layers.mlp.linear_fc1.weight` is [layers, rows, columns],
`…mlp.experts.experts.linear_fc1.weight` is [layers, experts, rows, columns]; a model whose layers
are not alike has their numbers in its keys. Local names of norms and experts are those of
Transformer Engine's layers. Source: megatron-core 0.8.0 to 0.16.1,
transformer/transformer_block.py, transformer/moe/experts.py (their sharded_state_dict) and
dist_checkpointing/mapping.py."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from parammap.checkpoint.index import NameResolver, StoredTensor, TensorEntry
from parammap.errors import RefusedError
from parammap.formats.torch_dist import Chunk, Chunked
from parammap.tensors.layout import Place
from parammap.tensors.logical import ITEMSIZE, Extent, Stored
from parammap.tensors.region import Region
from parammap.tensors.shard import Shard

_LAYERS = re.compile(r"(?<=layers\.)(?!\d)")
_EXPERTS = re.compile(r"\.experts\.experts\.(?!\d)")
#: a tensor flattened for the optimizer's sake has its own shape here, and its chunks are runs of a
#: rank's elements
_FLATTENED = "nd_reformulated_orig_global_shape"


def joined(parts: list[StoredTensor], whole: StoredTensor) -> StoredTensor:
    """The tensor `whole` (that has no extents) from its parts; its extents are theirs, in no
    order."""
    stored = replace(
        whole.found.stored,
        dtype=parts[0].found.stored.dtype,
        extents=tuple(extent for part in parts for extent in part.found.stored.extents),
    )
    return replace(whole, found=replace(whole.found, stored=stored), chunks=tuple(parts))


@dataclass(frozen=True, slots=True)
class Stack:
    """A key of the checkpoint as a stack of the model's tensors: the axes that number layers and
    experts come first."""

    key: str
    shape: tuple[int, ...]

    @property
    def axes(self) -> int:
        return bool(_LAYERS.search(self.key)) + self.with_experts

    @property
    def with_experts(self) -> bool:
        """Whether the last of the stacking axes numbers experts."""
        return bool(_EXPERTS.search(self.key))

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of one tensor."""
        return self.shape[self.axes :]

    def numbers(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*map(range, self.shape[: self.axes]))

    def name(self, numbers: tuple[int, ...]) -> str:
        """The name in the model of the tensor at these places of the stacking axes."""
        left = iter(numbers)
        name = _LAYERS.sub(lambda _: f"{next(left)}.", self.key, count=1)
        return _EXPERTS.sub(lambda _: f".experts.local_experts.{next(left)}.", name, count=1)


def stack_of(tensor: Chunked, mcore: dict[str, dict[str, Any]], key: str) -> Stack:
    """`key` is the tensor's without what says which state of the optimizer it is."""
    return Stack(key, tuple(mcore.get(tensor.key, {}).get(_FLATTENED) or tensor.shape))


def whole_of(
    stack: Stack, numbers: tuple[int, ...], state: str, dtype: str, naming: NameResolver
) -> StoredTensor:
    """What one tensor of a stack is, without where it lies."""
    return naming.hold(
        TensorEntry(stack.name(numbers), Place(), state, Stored(dtype, stack.inner, ()))
    )


def parts_of(
    tensor: Chunked, stack: Stack, state: str, naming: NameResolver
) -> Iterator[tuple[tuple[int, ...], StoredTensor]]:
    """What each chunk holds of each tensor of a stack, with that tensor's numbers."""
    wholes = {}
    for chunk in tensor.chunks:
        start, sizes, run = _box(tensor, stack, chunk)
        stored = tensor.read(chunk)
        (extent,) = stored.extents
        inner = math.prod(sizes[stack.axes :])
        for place, numbers in enumerate(
            itertools.product(
                *(
                    range(first, first + count)
                    for first, count in zip(start[: stack.axes], sizes[: stack.axes], strict=True)
                )
            )
        ):
            if numbers not in wholes:
                wholes[numbers] = whole_of(stack, numbers, state, tensor.dtype, naming)
            whole = wholes[numbers]
            itemsize = ITEMSIZE[tensor.dtype]
            shards = _shards(whole, start[stack.axes :], sizes[stack.axes :], tensor.key)
            if run:
                first, end = (element * itemsize for element in run)
                shards = tuple(
                    one.at("", -first) for shard in shards for one in shard.within(first, end)
                )
            numel = sum(shard.region.numel for shard in shards)
            part = Stored(
                tensor.dtype,
                (numel,),
                (Extent(extent.file, extent.offset + place * inner * itemsize, numel * itemsize),),
            )
            yield numbers, replace(whole, found=replace(whole.found, stored=part), parts=shards)


def _box(
    tensor: Chunked, stack: Stack, chunk: Chunk
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, int] | None]:
    """First element and size of a chunk in each dimension of the stack, and which run of those
    elements it is."""
    if stack.shape == tensor.shape:
        return chunk.offsets, chunk.sizes, None
    grid = tensor.shape[:-1]
    if len(grid) != len(stack.shape) or any(size != 1 for size in chunk.sizes[:-1]):
        raise RefusedError(
            f"{chunk.archive.file}: {tensor.key} is flattened in a way that is not known; save it "
            "with --dist-ckpt-optim-fully-reshardable"
        )
    sizes = tuple(whole // parts for whole, parts in zip(stack.shape, grid, strict=True))
    start = tuple(number * size for number, size in zip(chunk.offsets, sizes, strict=False))
    return start, sizes, (chunk.offsets[-1], chunk.offsets[-1] + chunk.sizes[-1])


def _shards(
    whole: StoredTensor, start: tuple[int, ...], sizes: tuple[int, ...], key: str
) -> tuple[Shard, ...]:
    """What a box of the whole tensor holds of its parts, as it lies in the box, row-major."""
    shape = whole.found.stored.shape
    if not shape:
        return whole.parts
    if (start[2:], sizes[2:]) != ((0,) * len(shape[2:]), shape[2:]):
        raise RefusedError(f"{key}: is cut along its third dimension, which cannot be converted")
    deep = math.prod(shape[2:])
    col, cols = (start[1] * deep, sizes[1] * deep) if len(shape) > 1 else (0, 1)
    result, width = [], math.prod(shape[1:])
    for part in whole.parts:
        pitch, itemsize = width * part.view.itemsize, part.view.itemsize
        for run in part.within(start[0] * pitch, (start[0] + sizes[0]) * pitch):
            box = Region((0,) * len(run.view.shape), run.view.shape).narrow(
                len(run.view.shape) - 1, col, col + cols
            )
            shard = run.cut(box)
            view = shard.view.restrided(width, (cols * itemsize, itemsize), (start[0], col))
            result.append(replace(shard, view=view))
    return tuple(result)
