"""One model-parallel part of a metaseq checkpoint: its shards' flat parameters cut back into named
ones.

A flat parameter's elements are its shards' one after the other, without each one's padding; the
optimizer's states are cut just as the weights are. Parameter i of the optimizer is the i-th in the
model's own order (torch.optim, state_dict)."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from parammap.errors import RefusedError
from parammap.frameworks.metaseq.metadata import Flat, ShardMetadata
from parammap.frameworks.metaseq.shard import ShardFile, read_shard
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, ITEMSIZE, Extent, Stored
from parammap.tensors.names import shorten_names

_MOMENTS = (EXP_AVG, EXP_AVG_SQ)
#: the buffers of metaseq's decoder (models/transformer_decoder.py,
#: modules/sinusoidal_positional_embedding.py)
_BUFFERS = (".version", "._float_tensor")


def read_part(
    number: int,
    paths: Sequence[Path],
    sidecar_folder: Path | None,
    lent: ShardMetadata | None,
    ema: bool,
) -> ModelPart:
    """Read the shards of a part; `lent` is its metadata if the files have none.

    Raises RefusedError for shards of different saves, and for files of which nobody knows what lies
    in them."""
    shards: list[ShardFile] = []
    for path in paths:
        shard = read_shard(path, not shards, sidecar_folder, ema)
        shards.append(shards[0].with_same_model(shard) if shards else shard)
    part = ModelPart(number, shards, shards[0].metadata or lent)
    part.check()
    return part


@dataclass(slots=True)
class ModelPart:
    """The shards of one part. `metadata` is the first one's, or lent; None if its tensors are
    whole."""

    number: int
    shards: list[ShardFile]
    metadata: ShardMetadata | None

    @property
    def first(self) -> ShardFile:
        return self.shards[0]

    @property
    def is_whole(self) -> bool:
        """Whether its tensors are in one file with their own names and shapes."""
        model, flats = self.first.model, self.metadata.flats if self.metadata else ()
        there = [model[flat.key] for flat in flats if flat.key in model]
        return len(self.shards) == 1 and (
            not there or any(len(stored.shape) > 1 for stored in there)
        )

    def check(self) -> None:
        """Refuse files of which nobody knows what lies in them, and a number of shards other than
        recorded."""
        if self.metadata is None and (
            len(self.shards) > 1 or any(_is_flat(name) for name in self.first.model)
        ):
            raise RefusedError(
                f"{self.first.path}: its parameters are flat and it has no shard_metadata; name "
                "the checkpoint that it was made from with --metadata-from"
            )
        sidecar = self.first.sidecar
        if sidecar and (there := sidecar.get("data_parallel_size")) not in (None, len(self.shards)):
            raise RefusedError(
                f"{self.first.path}: {len(self.shards)} shards are here, and its sidecar says "
                f"{there}; copy the whole checkpoint"
            )

    # -------------------------------------------------------------------------------------------------------
    # the weights

    def weights(self) -> dict[str, Stored]:
        """The parameters and buffers by full name, in the order of the file."""
        metadata = self.metadata
        if metadata is None or self.is_whole:
            if loose := [name for name in self.first.model if _is_flat(name)]:
                raise RefusedError(
                    f"{self.first.path}: holds {shorten_names(loose)}, which its shard metadata "
                    "does not name; name the checkpoint that it was made from with --metadata-from"
                )
            return _without_repeated(self.first.model)
        buffers = {
            name: self.first.model[name] for name in self.first.model if name in metadata.buffers
        }
        known = {flat.key for flat in metadata.flats} | metadata.buffers
        for shard in self.shards:
            if _without_repeated(shard.model, known).keys() != known:
                raise RefusedError(
                    f"{shard.path}: its model and its shard metadata do not name the same tensors: "
                    f"{shorten_names(map(str, shard.model.keys() ^ known))}; name the checkpoint "
                    "that it was made from with --metadata-from"
                )
        result = {
            name: stored
            for number, flat in enumerate(metadata.flats)
            for name, stored in _cut(flat, self._chunks(flat), self._valid(number, flat))
        }
        shared = {
            other: result[name]
            for name, other in metadata.shared
            if name in result and not other.endswith("output_projection.weight")
        }
        return {**result, **shared, **buffers}

    def _chunks(self, flat: Flat) -> list[Stored]:
        return [shard.model[flat.key] for shard in self.shards]

    def _valid(self, number: int, flat: Flat) -> list[int]:
        """How many elements of each chunk of a flat parameter are no padding."""
        sizes = [chunk.numel for chunk in self._chunks(flat)]
        paddings = [
            shard.metadata.paddings[number]
            for shard in self.shards
            if shard.metadata and shard.metadata.paddings is not None
        ]
        if len(paddings) < len(self.shards):
            return _filled(flat, sizes, self.first.path)
        valid = [size - padding for size, padding in zip(sizes, paddings, strict=True)]
        if min(paddings) < 0 or min(valid) < 0 or sum(valid) != flat.numel:
            raise RefusedError(
                f"{self.first.path}: the shards of {flat.key} hold {sum(valid)} elements without "
                f"padding, and its {len(flat.names)} parameters have {flat.numel}; a shard is "
                "missing, or its metadata is of another run"
            )
        return valid

    # ---------------------------------------------------------------------------------------------
    # the optimizer's states

    def moments(
        self, weights: dict[str, Stored]
    ) -> tuple[dict[str, dict[str, Stored]], dict[int, str]]:
        """The optimizer's states by state and full name, and the flat parameter that each of its
        numbers stands for."""
        if not self.first.states:
            return {}, {}
        self._check_states()
        flats = {
            flat.key: flat
            for flat in (self.metadata.flats if self.metadata else _each_its_own(weights))
        }
        index = self._index(flats)
        result: dict[str, dict[str, Stored]] = {state: {} for state in _MOMENTS}
        for number, key in index.items():
            for state in _MOMENTS:
                chunks = [shard.states[number][state] for shard in self.shards]
                result[state] |= _cut(flats[key], chunks, self._valid_states(flats[key], chunks))
        if lost := {
            name
            for state in _MOMENTS
            for name in result[state].keys() ^ result[EXP_AVG].keys()
            | result[state].keys() - weights.keys()
        }:
            raise RefusedError(
                f"{self.first.path}: the optimizer has states of {shorten_names(lost)}, and the "
                "model has no such tensor; convert --weights-only"
            )
        return result, index

    def _check_states(self) -> None:
        for shard in self.shards:
            if shard.states.keys() != self.first.states.keys():
                raise RefusedError(
                    f"{shard.path}: its optimizer steps other parameters than "
                    f"{self.first.path.name}'s; copy the checkpoint again"
                )
            for number, states in shard.states.items():
                strange = [
                    key
                    for key, value in states.items()
                    if key not in _MOMENTS
                    and isinstance(value, Stored)
                    and value.shape not in ((), (1,))
                ]
                if strange or any(not isinstance(states.get(state), Stored) for state in _MOMENTS):
                    raise RefusedError(
                        f"{shard.path}: parameter {number} of the optimizer has the states "
                        f"{sorted(map(str, states))}, and only Adam's {' and '.join(_MOMENTS)} can "
                        "be converted; convert --weights-only"
                    )

    def _index(self, flats: dict[str, Flat]) -> dict[int, str]:
        """Which flat parameter each number of the optimizer stands for: as recorded, or else in the
        model's order, or in that of the metadata, if the sizes agree."""
        numbers = sorted(self.first.states)
        orders = [[key for key in self.first.model if key in flats], list(flats)]
        if (index := self.first.optimizer_index) is not None:
            orders = [[index[number] for number in numbers if number in index]]
        for exactly in (True, False):
            for order in orders:
                if len(order) == len(numbers) and all(
                    self._is_of(number, flats.get(key), exactly)
                    for number, key in zip(numbers, order, strict=True)
                ):
                    return dict(zip(numbers, order, strict=True))
        raise RefusedError(
            f"{self.first.path}: the optimizer's {len(numbers)} states are not of the sizes of the "
            f"model's {len(flats)} flat parameters; name the sidecar's folder with --sidecar, or "
            "convert --weights-only"
        )

    def _is_of(self, number: int, flat: Flat | None, exactly: bool) -> bool:
        if flat is None:
            return False
        sizes: list[int] = [shard.states[number][EXP_AVG].numel for shard in self.shards]
        if exactly:
            return sizes == [
                shard.model[flat.key].numel if flat.key in shard.model else flat.numel
                for shard in self.shards
            ]
        return 0 <= sum(sizes) - flat.numel < max(sizes)

    def _valid_states(self, flat: Flat, chunks: list[Stored]) -> list[int]:
        """As of the weights, but for states of which a tool took the padding for content (metaseq,
        scripts/reshard_fsdp.py): they are one after the other all the same, and the padding comes
        last."""
        sizes = [chunk.numel for chunk in chunks]
        metadata = None if self.is_whole else self.metadata
        if metadata and sizes == [chunk.numel for chunk in self._chunks(flat)]:
            return self._valid(metadata.flats.index(flat), flat)
        return _filled(flat, sizes, self.first.path)


def _is_flat(name: str) -> bool:
    """Whether it is FSDP's name of a flat parameter (fairscale 0.4.13,
    nn/misc/flatten_params_wrapper.py)."""
    return name.rpartition(".")[2].startswith("flat_param_")


def _each_its_own(weights: dict[str, Stored]) -> Iterator[Flat]:
    """What the optimizer of a model that is not sharded steps: each parameter."""
    return (
        Flat(name, (name,), (stored.shape,))
        for name, stored in weights.items()
        if not name.endswith(_BUFFERS)
    )


def _without_repeated(model: dict[str, Stored], known: Container[str] = ()) -> dict[str, Stored]:
    """The tensors but those that are the very bytes of a tensor before them, or of a known one, by
    another name."""
    names = {stored: name for name, stored in reversed(model.items())} | {
        stored: name for name, stored in model.items() if name in known
    }
    return {
        name: stored for name, stored in model.items() if name in known or names[stored] == name
    }


def _filled(flat: Flat, sizes: list[int], file: Path) -> list[int]:
    """How many elements of each chunk are of the parameters, where padding is known to come last
    and nothing else is."""
    left, valid = flat.numel, []
    for size in sizes:
        valid.append(min(size, left))
        left -= valid[-1]
    if left or sum(sizes) - flat.numel >= max(sizes):
        raise RefusedError(
            f"{file}: the shards of {flat.key} hold {sum(sizes)} elements, and its "
            f"{len(flat.names)} "
            f"parameters have {flat.numel}; a shard is missing, or the metadata is of another run"
        )
    return valid


def _cut(flat: Flat, chunks: list[Stored], valid: list[int]) -> Iterator[tuple[str, Stored]]:
    """The parameters of which the chunks' elements, without padding, are those of one after the
    other."""
    dtypes = {chunk.dtype for chunk in chunks}
    if len(dtypes) > 1:
        raise RefusedError(
            f"{chunks[0].extents[0].file}: {flat.key} is {' and '.join(sorted(dtypes))} in other "
            "shards; copy the checkpoint again"
        )
    (dtype,) = dtypes
    itemsize, runs, used = ITEMSIZE[dtype], iter(zip(chunks, valid, strict=True)), 0
    run = Extent("", 0, 0)
    for name, shape in zip(flat.names, flat.shapes, strict=True):
        left, extents = math.prod(shape) * itemsize, []
        while left:
            if used == run.nbytes:
                chunk, numel = next(runs)
                run, used = (
                    Extent(chunk.extents[0].file, chunk.extents[0].offset, numel * itemsize),
                    0,
                )
            nbytes = min(left, run.nbytes - used)
            if nbytes:
                extents.append(Extent(run.file, run.offset + used, nbytes))
            used, left = used + nbytes, left - nbytes
        yield name, Stored(dtype, shape, tuple(extents))
