"""The sidecar: what the hook wrote beside a checkpoint, read and checked.

Two generations are read. A *layout* file (`layout_tp00_pp000[_ep000].json`, schema in
schemas/layout.schema.json) holds everything. A bare *map*
(`param_map_buffer{b}_dp{d}tp{t}pp{p}vpp{v}[ep{e}].json`, written by MindSpeed-Core-MS's own patch)
holds `{"module." + name: [dtype, shape, start, end, bucket]}` of one buffer and nothing else."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from parammap.checkpoint.cuts import Partition
from parammap.errors import RefusedError
from parammap.formats import json_document
from parammap.formats.json_schema import Check, compiled, opened

SCHEMA, VERSION = "parammap.layout", 1
_LAYOUT_FILE = re.compile(r"layout_tp(\d+)_pp(\d+)(?:_ep(\d+))?\.json$")
_MAP_FILE = re.compile(r"param_map_buffer(\d+)_dp(\d+)tp(\d+)pp(\d+)vpp(\d+)(?:ep(\d+))?\.json$")

Coordinates = tuple[int, int, int]

#: a legacy model's name for its last stage's copy of the word embedding, and its key in the
#: checkpoint
_HEAD_NAME, _HEAD_KEY = "word_embeddings.weight", "word_embeddings_for_head.weight"
#: what a layout file says of a parameter with yes or no
_FLAGS = ("tied", "expert", "sequence_parallel")


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one parameter lies in a buffer: elements [start, end) of the padded buffer, inside
    bucket `bucket`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int
    bucket: int
    partition_dim: int | None = None
    partition_stride: int = 1
    tensor_parallel: bool | None = None
    tied: bool = False
    expert: bool = False
    sequence_parallel: bool = False

    @property
    def partition(self) -> Partition:
        return Partition(
            self.partition_dim, self.partition_stride, self.tensor_parallel, self.expert
        )


@dataclass(frozen=True, slots=True)
class Bucket:
    """Elements [start, end) of the padded buffer, of which the first `numel_unpadded` are used."""

    start: int
    end: int
    numel_unpadded: int


@dataclass(frozen=True, slots=True)
class Buffer:
    """One flat buffer of a distributed optimizer; `buckets` is None where the sidecar does not
    record them."""

    chunk: int
    param_dtype: str | None
    grad_dtype: str | None
    buckets: tuple[Bucket, ...] | None
    slots: tuple[Slot, ...]


#: the buffers of each optimizer in a rank's chain; None: held by another rank
Optimizers: TypeAlias = tuple[tuple[Buffer, ...] | None, ...]


@dataclass(frozen=True, slots=True)
class RankSidecar:
    """What is known of one (tp, pp, ep): the buffers of each optimizer in the chain; None: held by
    another rank."""

    optimizers: Optimizers
    layout: dict[str, Any] | None = None


@dataclass(slots=True)
class Sidecar:
    """All ranks' sidecars of one save. `complete` is False for bare maps, which name dense buffers
    only."""

    folder: Path
    ranks: dict[Coordinates, RankSidecar]
    complete: bool
    iteration: int | None = None
    files: list[Path] = field(default_factory=list)

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """The name and content of each of its files: as they were read, or as the hook would write
        them."""
        if self.files:
            yield from ((path.name, path.read_bytes()) for path in self.files)
            return
        for rank, known in self.ranks.items():
            if layout := known.layout:
                yield (
                    f"layout{_suffix(rank, layout)}.json",
                    json.dumps(_layout_content(layout, known.optimizers)).encode(),
                )
                yield from _map_contents(
                    rank,
                    layout,
                    known.optimizers,
                    self.ranks[rank[0], rank[1], 0].optimizers[0] or (),
                )

    def buffers(self, rank: Coordinates) -> Iterator[Buffer]:
        """The buffers of the parameters of a rank's model that are stepped, without other ranks'
        parameters. Dense ones of which only the first expert rank's optimizer holds the state are
        every expert rank's."""
        for coordinates in dict.fromkeys(((rank[0], rank[1], 0), rank)):
            for buffers in self.ranks[coordinates].optimizers if coordinates in self.ranks else ():
                for buffer in buffers or ():
                    yield replace(
                        buffer,
                        slots=tuple(s for s in buffer.slots if coordinates == rank or not s.expert),
                    )

    def slots(self, rank: Coordinates) -> Iterator[tuple[int, Slot]]:
        """The chunk and the slot of each parameter of a rank's model that is stepped."""
        for buffer in self.buffers(rank):
            yield from ((buffer.chunk, slot) for slot in buffer.slots)

    def any_layout(self) -> dict[str, Any] | None:
        """A rank's layout file, of one that has layers if there is any: it tells more of the model."""
        layouts = [rank.layout for rank in self.ranks.values() if rank.layout]
        with_layers = (
            one for one in layouts if any(chunk["layers"] for chunk in one.get("chunks", ()))
        )
        return next(with_layers, layouts[0] if layouts else None)


def read(folder: Path) -> Sidecar | None:
    """The sidecar in `folder`: its layout files if it has any, else its bare maps; None if it has
    neither."""
    if not folder.is_dir():
        return None
    names = sorted(path.name for path in folder.iterdir())
    layouts = list(filter(None, map(_LAYOUT_FILE.match, names)))
    maps = list(filter(None, map(_MAP_FILE.match, names)))
    if not layouts and not maps:
        return None
    sidecar = _read_layouts(folder, layouts) if layouts else _read_maps(folder, maps)
    sidecar.files = [folder / match.string for match in layouts + maps]
    return sidecar


def _read_layouts(folder: Path, layouts: list[re.Match[str]]) -> Sidecar:
    ranks: dict[Coordinates, RankSidecar] = {}
    iterations: set[int | None] = set()
    for match in layouts:
        name = match.string
        tp, pp, ep = (int(number or 0) for number in match.groups())
        data = json_document.read(
            folder / name,
            _is_layout(),
            f"take the save's own {SCHEMA} file of version {VERSION}, or the ParamMap release that "
            "matches the hook that wrote it",
        )
        try:
            marked = _has_marks(data["optimizers"])
            buffers = tuple(_layout_optimizer(entry, marked) for entry in data["optimizers"])
            ranks[tp, pp, ep] = RankSidecar(
                buffers, {**data, "optimizers": _without_buffers(data["optimizers"])}
            )
        except ValueError as error:
            raise RefusedError(
                f"{folder / name}: damaged layout file ({error}); take the save's own"
            ) from error
        iterations.add(data.get("iteration"))
    if len(iterations) > 1:
        raise RefusedError(
            f"{folder}: layout files of several iterations "
            f"{sorted(iterations, key=lambda number: number or 0)}; "
            "use the folder that lies inside the iteration's own folder"
        )
    return Sidecar(folder, ranks, complete=True, iteration=iterations.pop())


@cache
def _is_layout() -> Check:
    """The check of a layout file. Those of earlier writers may lack what they did not know of the
    model and of a parameter, and those of later ones have more."""
    form = opened(json_document.schema("layout"))
    form["properties"]["model"]["required"] = []
    form["$defs"]["param"]["required"] = ["name", "shape", "dtype", "start", "end", "bucket"]
    return compiled(form)


def _without_buffers(optimizers: list[dict[str, Any] | None]) -> list[dict[str, Any] | None]:
    return [
        entry and {key: value for key, value in entry.items() if key != "buffers"}
        for entry in optimizers
    ]


def _has_marks(optimizers: list[dict[str, Any] | None]) -> bool:
    """Whether tensor_parallel was recorded. ParamMap up to 0.1 wrote false for every parameter
    where it did not know: in a real model some are cut."""
    return any(
        p.get("tensor_parallel")
        for entry in optimizers
        if entry
        for b in entry["buffers"]
        for p in b["params"]
    )


def _layout_optimizer(entry: dict[str, Any] | None, marked: bool) -> tuple[Buffer, ...] | None:
    if entry is None:
        return None
    return tuple(
        Buffer(
            buffer["chunk"],
            buffer["param_dtype"],
            buffer["grad_dtype"],
            tuple(Bucket(b["start"], b["end"], b["numel_unpadded"]) for b in buffer["buckets"]),
            tuple(
                _checked(
                    Slot(
                        p["name"],
                        tuple(p["shape"]),
                        p["dtype"],
                        p["start"],
                        p["end"],
                        p["bucket"],
                        p.get("partition_dim"),
                        p.get("partition_stride", 1),
                        bool(p.get("tensor_parallel")) if marked else None,
                        *(bool(p.get(flag)) for flag in _FLAGS),
                    )
                )
                for p in buffer["params"]
            ),
        )
        for buffer in entry["buffers"]
    )


def _suffix(rank: Coordinates, layout: dict[str, Any]) -> str:
    tp, pp, ep = rank
    return f"_tp{tp:02}_pp{pp:03}" + (f"_ep{ep:03}" if layout["parallel"]["ep"] > 1 else "")


def _layout_content(layout: dict[str, Any], known: Optimizers) -> dict[str, Any]:
    """A layout file's content."""
    optimizers = [
        None if buffers is None else {**entry, "buffers": list(map(_buffer_content, buffers))}
        for entry, buffers in zip(layout["optimizers"], known, strict=True)
    ]
    return {**layout, "optimizers": optimizers}


def _buffer_content(buffer: Buffer) -> dict[str, Any]:
    buckets = buffer.buckets or ()
    return {
        "chunk": buffer.chunk,
        "param_dtype": buffer.param_dtype,
        "grad_dtype": buffer.grad_dtype,
        "numel": buckets[-1].end,
        "buckets": [asdict(bucket) for bucket in buckets],
        "params": [
            {**asdict(slot), "shape": list(slot.shape)}
            for slot in sorted(buffer.slots, key=lambda slot: slot.start)
        ],
    }


def _map_contents(
    rank: Coordinates, layout: dict[str, Any], known: Optimizers, dense: tuple[Buffer, ...]
) -> Iterator[tuple[str, bytes]]:
    """The maps of MindSpeed-Core-MS (r0.1.0, param_map.patch): a chunk's `dense` buffers count
    first, then its experts'."""
    tp, pp, ep = rank
    after = f"ep{ep}" if layout["parallel"]["ep"] > 1 else ""
    counted: Counter[int] = Counter()
    for buffers in known:
        for buffer in dense if buffers is None else buffers:
            number = counted[buffer.chunk]
            counted[buffer.chunk] += 1
            if buffers is not None:
                yield (
                    f"param_map_buffer{number}_dp0tp{tp}pp{pp}vpp{buffer.chunk}{after}.json",
                    json.dumps(
                        {
                            _map_name(slot.name): [
                                f"torch.{slot.dtype}",
                                list(slot.shape),
                                slot.start,
                                slot.end,
                                slot.bucket,
                            ]
                            for slot in sorted(buffer.slots, key=lambda slot: slot.start)
                        }
                    ).encode(),
                )


def _read_maps(folder: Path, maps: list[re.Match[str]]) -> Sidecar:
    """Bare maps. Every data-parallel rank wrote a copy: the copies must agree, and count once."""
    found: dict[tuple[Coordinates, int, int], tuple[Slot, ...]] = {}
    for match in maps:
        name = match.string
        buffer, _, tp, pp, vpp, ep = (int(number or 0) for number in match.groups())
        key = (tp, pp, ep), vpp, buffer
        slots = _map_slots(folder / name)
        if found.setdefault(key, slots) != slots:
            raise RefusedError(
                f"{folder / name}: disagrees with the map that another data-parallel rank wrote; "
                "these files are of different runs"
            )
    ranks: dict[Coordinates, list[Buffer]] = {}
    for (rank, vpp, _), slots in sorted(found.items()):
        ranks.setdefault(rank, []).append(Buffer(vpp, None, None, None, slots))
    return Sidecar(
        folder,
        {rank: RankSidecar((tuple(buffers),)) for rank, buffers in ranks.items()},
        complete=False,
    )


def _map_slots(path: Path) -> tuple[Slot, ...]:
    data = json_document.read(
        path, json_document.check_of("param_map"), "take the map written with this checkpoint"
    )
    try:
        return tuple(
            _checked(
                Slot(
                    _checkpoint_name(name),
                    tuple(shape),
                    dtype.removeprefix("torch."),
                    start,
                    end,
                    bucket,
                )
            )
            for name, (dtype, shape, start, end, bucket) in data.items()
        )
    except ValueError as error:
        raise RefusedError(
            f"{path}: not a parameter map ({error}); take the one written with this checkpoint"
        ) from error


def _checkpoint_name(name: str) -> str:
    """A parameter's key in model_optim_rng.pt from its name in a map (legacy models rename the tied
    head's copy)."""
    name = name.removeprefix("module.")
    return _HEAD_KEY if name == _HEAD_NAME else name


def _map_name(key: str) -> str:
    return f"module.{_HEAD_NAME if key == _HEAD_KEY else key}"


def _checked(slot: Slot) -> Slot:
    if slot.end - slot.start != math.prod(slot.shape) or slot.start < 0:
        raise ValueError(
            f"{slot.name} of shape {list(slot.shape)} cannot fill elements {slot.start} to "
            f"{slot.end}"
        )
    return slot
