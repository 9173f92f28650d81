"""The index of a checkpoint: for each tensor on disk, which boxes of which logical tensors it
holds.

A framework reader finds named tensors at places; this module says what they are, by the family's
tables, or, for a name no family knows, by the partition facts of the sidecar."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from parammap import families
from parammap.checkpoint.cuts import UNRECORDED, Partition, kind_of
from parammap.errors import RefusedError
from parammap.tensors.arrangement import (
    EXPERTS_FC1,
    EXPERTS_FC2,
    GATE_UP,
    GROUPED,
    KVQ,
    PADDING,
    QK,
    QKV,
    QKV_DOWN,
    REPLICATED,
    SHARD_0,
    STACKED_QKV,
    VOCAB,
    Part,
    Sizes,
    arranged,
)
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import MODEL_PARAM, LogicalTensor, Stored
from parammap.tensors.region import Region, covers_once
from parammap.tensors.shard import Shard, lying, refined

#: the segment of a canonical name that names the fused tensor, and is replaced by each atom's name
_FUSED_SEGMENT = {
    QKV: "qkv",
    STACKED_QKV: "qkv",
    QK: "qk",
    KVQ: "qkv",
    GATE_UP: "fc1",
    EXPERTS_FC1: "grouped.fc1",
    EXPERTS_FC2: "grouped.fc2",
    QKV_DOWN: "qkv_down",
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor as a reader found it: its key in the checkpoint, where it lives, its state, and what
    the sidecar says."""

    name: str
    place: Place
    state: str
    stored: Stored
    partition: Partition = UNRECORDED

    @property
    def where(self) -> str:
        """The file it lies in, or, for one that is yet to be written, its place."""
        return self.stored.extents[0].file if self.stored.extents else str(self.place)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk and what it is: `canonical` is its fused canonical name, `kind` its
    arrangement (None: nobody knows how it is cut), `parts` what it is of which logical tensors:
    where each lies in it, row-major, whatever the file does.

    A tensor that no file holds in one piece, and that therefore has no extents, has `chunks`."""

    found: TensorEntry
    canonical: str
    row: families.Row | None
    kind: str | None
    parts: tuple[Shard, ...]
    chunks: tuple[StoredTensor, ...] = ()

    @property
    def is_tied_head(self) -> bool:
        """Whether it is the last stage's copy of the word embedding."""
        return (
            self.canonical == families.WORD_EMBEDDING
            and self.row is not None
            and self.row.canonical == families.HEAD
        )

    @property
    def layer(self) -> int | None:
        layer = families.layer_of(self.canonical)
        return layer and layer[1]

    def shards(self, replica: int, only: LogicalTensor | None = None) -> Iterator[Shard]:
        """Where its parts, or those of one logical tensor, lie in the files; several extents give
        shards for each."""
        stored = self.found.stored
        for chunk in self.chunks:
            yield from chunk.shards(replica, only)
        if stored.extents and not self.chunks:
            turned = is_transposed(self.row, stored.shape)
            for part in self.parts:
                if only is None or only is part.tensor or only == part.tensor:
                    yield from lying(part, stored, turned, replica)


def is_transposed(row: families.Row | None, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape on disk is the transpose, [in, out], of what it is logically;
    only matrices are."""
    return row is not None and row.transposed and len(shape) == 2


@dataclass(slots=True)
class NameResolver:
    """What turns a checkpoint's names into canonical ones: global layer numbers by (pp, vpp) and
    path (None: the names hold global numbers), experts per rank, what the model is like: sizes,
    gating, and whether its head is the word embedding (None: nobody recorded it, and the two count
    as different tensors)."""

    dialect: str
    layout: Layout
    layers: dict[tuple[int, int], dict[str, list[int]]] | None
    experts_per_rank: int | None
    sizes: Sizes
    gated: bool
    tied: bool | None = None

    def canonical(self, found: TensorEntry) -> str:
        """The canonical name, fused, that a tensor has if it is cut in a way that somebody
        knows."""
        row = families.find(found.name, self.dialect)
        try:
            layer, expert = (
                self.layer(found.name, found.place),
                self.expert(found.name, found.place),
            )
        except RefusedError as error:
            raise RefusedError(f"{found.where}: {error}") from error
        canonical = (
            row.canonical.format(i=layer, e=expert)
            if row
            else families.renumber(found.name, layer, expert)
        )
        is_tied = canonical == families.HEAD and (self.tied or found.name in families.TIED_HEADS)
        return families.WORD_EMBEDDING if is_tied else canonical

    def hold(self, found: TensorEntry) -> StoredTensor:
        row, canonical = families.find(found.name, self.dialect), self.canonical(found)
        kind = kind_of(
            found.name, row, found.partition, found.stored.shape, self.layout.tp, self.sizes
        )
        if kind is None or (kind in GROUPED and not self.sizes.experts):
            return _hold(found, f"{canonical} of {found.place}", None, None, self)
        if self._is_plain(kind):
            kind = SHARD_0
        return _hold(found, canonical, row, kind, self)

    def _is_plain(self, kind: str) -> bool:
        """Whether a tensor that may be fused is plain rows in this model."""
        return (
            (kind == QKV and self.sizes.heads is None)
            or (kind == GATE_UP and not self.gated)
            or (kind == VOCAB and self.sizes.vocab is None)
        )

    def expert(self, name: str, place: Place) -> int | None:
        """The global number of the expert that a name is of."""
        expert = families.expert_of(name)
        return expert if expert is None else expert + place.ep * (self.experts_per_rank or 0)

    def experts_of(self, place: Place) -> range:
        """The global numbers of the experts that a rank holds, where their number is recorded."""
        count = (self.sizes.experts or 0) // self.layout.ep
        return range(place.ep * count, (place.ep + 1) * count)

    def layer(self, name: str, place: Place) -> int | None:
        """The global number of the layer that a name is of."""
        layer = families.layer_of(name)
        if layer is None or self.layers is None:
            return layer and layer[1]
        prefix, local = layer
        numbers = self.layers.get((place.pp, place.vpp), {}).get(prefix, [])
        if local >= len(numbers):
            raise RefusedError(
                f"{name} is layer {local} of {len(numbers)} that {place} should hold; the sidecar "
                "is of another run"
            )
        return numbers[local]


def _hold(
    found: TensorEntry,
    canonical: str,
    row: families.Row | None,
    kind: str | None,
    naming: NameResolver,
) -> StoredTensor:
    shape, turned = found.stored.shape, is_transposed(row, found.stored.shape)
    if turned and kind == EXPERTS_FC1:
        raise RefusedError(f"{found.where}: {found.name} lies transposed, which {kind} never does")
    try:
        parts = arranged(
            kind or REPLICATED,
            shape[::-1] if turned else shape,
            naming.layout.tp,
            found.place.tp,
            naming.sizes,
            naming.experts_of(found.place),
            found.stored.dtype,
        )
    except RefusedError as error:
        raise RefusedError(f"{found.where}: {found.name}: {error}") from error
    return StoredTensor(
        found, canonical, row, kind, atoms(found.state, canonical, kind, found.stored.dtype, parts)
    )


def atoms(
    state: str, canonical: str, kind: str | None, dtype: str, parts: tuple[Part, ...]
) -> tuple[Shard, ...]:
    """The logical tensors of which a tensor's parts are regions, with where these lie in it."""
    tensors = {
        name: LogicalTensor(state, atom_name(canonical, kind, name), dtype, shape)
        for name, shape in {part.name: part.shape for part in parts}.items()
    }
    return tuple(Shard(tensors[part.name], part.region, part.view) for part in parts)


def in_state(held: StoredTensor, state: str, dtype: str | None = None) -> StoredTensor:
    """The tensor as another state of the same parameters, of `dtype` if that is another too."""
    return replace(
        held,
        found=replace(held.found, state=state),
        parts=tuple(
            replace(
                part,
                tensor=part.tensor
                and replace(part.tensor, state=state, dtype=dtype or part.tensor.dtype),
            )
            for part in held.parts
        ),
    )


def atom_name(canonical: str, kind: str | None, part: str) -> str:
    """The name of the logical tensor that a part of a tensor belongs to."""
    if not part:
        return canonical
    return (
        canonical.replace(_FUSED_SEGMENT[kind], part)
        if kind in _FUSED_SEGMENT
        else f"{canonical}.{part}"
    )


def is_padding(tensor: LogicalTensor) -> bool:
    """Whether a logical tensor is a vocabulary's padding, of which each layout has its own."""
    return tensor.name.endswith(f".{PADDING}")


class Shards(Mapping[LogicalTensor, dict[Region, list[Shard]]]):
    """The shards of each logical tensor by region, by row, where equal regions are replicas; made
    when asked for, some are kept, so that only who holds what is kept for good."""

    def __init__(self, holders: dict[LogicalTensor, list[StoredTensor]], layout: Layout) -> None:
        self.holders, self.layout = holders, layout
        self._expand = lru_cache(maxsize=64)(self._expanded)
        self._rows = lru_cache(maxsize=64)(self._sorted_rows)

    def __getitem__(self, tensor: LogicalTensor) -> dict[Region, list[Shard]]:
        return self._expand(tensor)

    def __iter__(self) -> Iterator[LogicalTensor]:
        return iter(self.holders)

    def __len__(self) -> int:
        return len(self.holders)

    def _expanded(self, tensor: LogicalTensor) -> dict[Region, list[Shard]]:
        regions: dict[Region, list[Shard]] = {}
        for held in self.holders[tensor]:
            for shard in held.shards(replica_of(held, self.layout), tensor):
                regions.setdefault(shard.region, []).append(shard)
        if sum(region.numel for region in regions) > tensor.rows * tensor.cols:
            regions = refined(regions)
        for shards in regions.values():
            shards.sort(key=lambda shard: shard.replica)
        return dict(sorted(regions.items(), key=lambda item: item[0].offsets))

    def overlapping(
        self, tensor: LogicalTensor, region: Region
    ) -> Iterator[tuple[Region, list[Shard]]]:
        """The parts of `region` that the tensor's regions hold, by row, with the shards of each
        such region by replica."""
        rows, regions, tallest = self._rows(tensor)
        first = bisect_left(rows, region.offsets[0] - tallest + 1)
        end = bisect_left(rows, region.ends[0])
        shards = self[tensor]
        for there in regions[first:end]:
            if part := there.intersect(region):
                yield part, shards[there]

    def _sorted_rows(self, tensor: LogicalTensor) -> tuple[list[int], list[Region], int]:
        regions = list(self[tensor])
        return (
            [region.offsets[0] for region in regions],
            regions,
            max((region.sizes[0] for region in regions), default=0),
        )


def _cover(tensor: LogicalTensor, holders: list[StoredTensor]) -> bool:
    """Whether parts of whole stored tensors are all of it; seen without a look at where in the
    files they lie, which takes the longest."""
    return all(held.found.stored.is_whole and not held.chunks for held in holders) and covers_once(
        list({part.region for held in holders for part in held.parts if part.tensor == tensor}),
        tensor.matrix,
    )


def replica_of(held: StoredTensor, layout: Layout) -> int:
    """A number for who holds it, among those that may keep copies of one box: the word embedding's
    own ranks, then its copies at the head; each by expert- and tensor-parallel place."""
    return (held.is_tied_head * layout.ep + held.found.place.ep) * layout.tp + held.found.place.tp


@dataclass(slots=True)
class Index:
    """All of a checkpoint's tensors, who holds each logical tensor, and its shards."""

    held: list[StoredTensor]
    layout: Layout
    holders: dict[LogicalTensor, list[StoredTensor]] = field(default_factory=dict)
    shards: Shards = field(init=False)

    def __post_init__(self) -> None:
        known: dict[tuple[str, str], LogicalTensor] = {}
        for held in self.held:
            for tensor in dict.fromkeys(part.tensor for part in held.parts if part.tensor):
                first = known.setdefault((tensor.state, tensor.name), tensor)
                if first != tensor:
                    raise RefusedError(
                        f"{held.found.where}: {tensor.name} ({tensor.state}) is {tensor.dtype} "
                        f"{list(tensor.shape)} here and {first.dtype} {list(first.shape)} on "
                        "another rank; these files are of different runs"
                    )
                self.holders.setdefault(first, []).append(held)
        self.shards = Shards(self.holders, self.layout)

    def check_complete(self) -> None:
        """Refuse unless the shards of every logical tensor cover each of its elements exactly
        once."""
        for tensor, holders in self.holders.items():
            if _cover(tensor, holders):
                continue
            regions = self.shards[tensor]
            if not covers_once(list(regions), tensor.matrix):
                files = sorted({shard.view.file for shards in regions.values() for shard in shards})
                raise RefusedError(
                    f"{files[0]}: the pieces of {tensor.name} ({tensor.state}) found in "
                    f"{len(files)} files do not make up its shape {list(tensor.shape)} exactly "
                    "once; a rank is missing"
                )

    def tensors(self, state: str) -> list[LogicalTensor]:
        return [tensor for tensor in self.shards if tensor.state == state]

    def num_layers(self) -> int:
        return 1 + max((held.layer for held in self.held if held.layer is not None), default=-1)

    def states(self) -> set[str]:
        return {tensor.state for tensor in self.shards if tensor.state != MODEL_PARAM}
