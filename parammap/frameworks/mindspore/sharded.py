"""Checkpoints of MindSpeed-Core-MS's own distributed optimizer: flat buckets, cut over the data
parallel ranks.

Source: MindSpeed-Core-MS r0.1.0, mindspeed_ms/core/{optimizer,ddp}/distrib_optimizer.py and
core/distributed/param_and_grad_buffer.py. Of each bucket of n elements every rank of the data
parallel group (context parallel ranks count as data parallel ones) saves its n/dp, in ascending
rank order, as float32 `buffer_b_bucket_k`, `exp_avg.buffer_b_bucket_k` and
`exp_avg_sq.buffer_b_bucket_k`. The group's first rank writes once, when training starts,
`opt_shard_info/rank_N/dist_opt_shard_info_rank_N-0_0.json`: which elements [start, end) of which
buffer each parameter fills. Parameters of ZeRO-3 lie in no buffer: each rank saves its equal part
of their dim 0 under their own names."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parammap.checkpoint.sidecar import Bucket, Slot
from parammap.errors import RefusedError
from parammap.formats import json_document, regular_file
from parammap.frameworks.mindspore.formats import BY_SUFFIX
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, ITEMSIZE, Extent, Stored
from parammap.tensors.names import shorten_names

STRATEGY_FOLDER = "opt_shard_info"
#: what a combined file's name ends with, before its suffix
MERGED = "_dp_merged"
#: the name prefix of each state
PREFIXES = ("", f"{EXP_AVG}.", f"{EXP_AVG_SQ}.")
_RANK_FOLDER = re.compile(r"rank_(\d+)$")
_SHARD = re.compile(r"(?:exp_avg\.|exp_avg_sq\.)?buffer_\d+_bucket_\d+$")
#: a parameter is followed by at most so many bytes, in its own dtype, that align the next one
_MAX_GAP_BYTES = 512 + 32 - 1
#: scalars that count steps: files in which they differ are of different moments
_COUNTERS = ("state_step", "step_num", "epoch_num", "global_step")
#: what each rank's file has by one name
_Entries = Sequence[Stored | str | None]


@dataclass(frozen=True, slots=True)
class StrategyBuffer:
    """A flat buffer; `param_dtype` is None where no parameter lies in it."""

    param_dtype: str | None
    buckets: tuple[Bucket, ...]
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class Strategy:
    """What the first rank of a data parallel group wrote of its buffers; `zero3` lists names, those
    of moments too."""

    file: Path
    ranks: tuple[int, ...]
    buffers: tuple[StrategyBuffer, ...]
    zero3: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Combined:
    """A data parallel group's state, as one rank would hold it.

    `states` are the parameters' float32 states, whole, under the parameters' names, in the
    strategy's order; `others` what else the ranks hold, each the first rank's copy; `repeated` what
    the states hold as well; `strings` the entries that are text. `files` are the files read, by
    rank."""

    files: dict[int, Path]
    states: dict[str, Stored]
    others: dict[str, Stored]
    repeated: list[str]
    strings: list[str]


def whole(file: Path, entries: dict[str, Stored]) -> dict[str, Stored]:
    """The entries of `file`, the newest in a `rank_N` folder; where they are shards, those of its
    data parallel group.

    The strategy is looked for in `opt_shard_info` beside the rank folders. Raises RefusedError as
    `combined` does."""
    if not any(map(_SHARD.match, entries)):
        return entries
    root, rank = file.parent.parent, int(file.parent.name.removeprefix("rank_"))
    path = strategy_files(root / STRATEGY_FOLDER).get(rank)
    if path is None:
        raise RefusedError(
            f"{file}: holds a rank's part of flat buckets, and {root / STRATEGY_FOLDER} has no "
            f"strategy of rank {rank} that says what lies where; copy that folder as well"
        )
    group = combined(read_strategy(path, rank), root, suffixes=(file.suffix,))
    return group.states | group.others


def strategy_files(folder: Path) -> dict[int, Path]:
    """The strategy of each data parallel group in an `opt_shard_info` folder, by the group's first
    rank, ascending."""
    if not folder.is_dir():
        return {}
    ranks = sorted(
        int(match.group(1)) for name in os.listdir(folder) if (match := _RANK_FOLDER.match(name))
    )
    paths = {
        rank: folder / f"rank_{rank}" / f"dist_opt_shard_info_rank_{rank}-0_0.json"
        for rank in ranks
    }
    return {rank: path for rank, path in paths.items() if path.is_file()}


def newest_file(folder: Path, suffixes: tuple[str, ...] = tuple(BY_SUFFIX)) -> Path:
    """The file of a rank's folder that was written last, what was combined before left out."""
    if not folder.is_dir():
        raise RefusedError(f"{folder}: missing; copy the whole checkpoint")
    files = [
        path
        for path in folder.iterdir()
        if path.suffix in suffixes and not path.stem.endswith(MERGED)
    ]
    if not files:
        raise RefusedError(
            f"{folder}: has no {' and no '.join(suffixes)} file; copy the whole checkpoint"
        )
    return newest(files)


def newest(files: Iterable[Path]) -> Path:
    """The file written last; of several written at once, as a copy may date them, the one with the
    highest numbers."""
    return max(
        files,
        key=lambda path: (path.stat().st_mtime_ns, [int(n) for n in re.findall(r"\d+", path.name)]),
    )


def combined(
    strategy: Strategy,
    folder: Path,
    prefixes: tuple[str, ...] = PREFIXES,
    suffixes: tuple[str, ...] = tuple(BY_SUFFIX),
) -> Combined:
    """Where the whole states of a group lie in the newest files of `folder/rank_N`; `prefixes` are
    the states to take.

    Raises RefusedError for a file that is missing, damaged, of another step or of another run than
    the strategy."""
    files = {rank: newest_file(folder / f"rank_{rank}", suffixes) for rank in strategy.ranks}
    contents = [BY_SUFFIX[path.suffix].entries(path) for path in files.values()]
    paths = list(files.values())
    _check_same_step(paths, contents)
    shards: dict[str, _Entries] = {n: [c.get(n) for c in contents] for n in _expected(strategy)}
    states = dict(_bucket_states(strategy, paths, shards, prefixes))
    for name in strategy.zero3:
        if not name.startswith(tuple(set(PREFIXES) - set(prefixes))):
            if name in states:
                raise RefusedError(
                    f"{strategy.file}: {name} is both in a buffer and in zero3_params; it is "
                    f"damaged"
                )
            states[name] = _stacked(name, paths, [content.get(name) for content in contents])
    rest: dict[str, Stored | str] = {}
    for content in reversed(contents):
        rest |= {name: entry for name, entry in content.items() if name not in shards}
    _check_no_shard_left(strategy, paths[0], rest)
    ordered = dict.fromkeys(name for content in contents for name in content if name in rest)
    others = {
        name: rest[name] for name in ordered if name not in states and name not in strategy.zero3
    }
    return Combined(
        files,
        states,
        {name: entry for name, entry in others.items() if isinstance(entry, Stored)},
        [name for name in ordered if name in states and name not in strategy.zero3],
        [name for name, entry in others.items() if isinstance(entry, str)],
    )


def _check_same_step(paths: list[Path], contents: list[Mapping[str, Stored | str]]) -> None:
    for name in _COUNTERS:
        values = [
            _content(entry) if isinstance(entry := content.get(name), Stored) else None
            for content in contents
        ]
        for path, value in zip(paths, values, strict=True):
            if value != values[0]:
                raise RefusedError(
                    f"{path}: its {name} is not that of {paths[0]}; the newest files of these "
                    f"ranks are of different saves: remove what an interrupted save left"
                )


def _content(stored: Stored) -> bytes:
    extent = stored.extents[0]
    with regular_file.opened(extent.file) as file:
        return os.pread(file.fileno(), min(extent.nbytes, 64), extent.offset)


def _expected(strategy: Strategy) -> Iterator[str]:
    for b, buffer in enumerate(strategy.buffers):
        for k in range(len(buffer.buckets)):
            for prefix in PREFIXES:
                yield f"{prefix}buffer_{b}_bucket_{k}"


def _check_no_shard_left(strategy: Strategy, path: Path, rest: dict[str, Stored | str]) -> None:
    left = [name for name in rest if _SHARD.match(name)]
    if left:
        raise RefusedError(
            f"{path}: holds {shorten_names(left)}, of which {strategy.file} says nothing; they are "
            f"of different runs"
        )


def _bucket_states(
    strategy: Strategy, paths: list[Path], shards: dict[str, _Entries], prefixes: tuple[str, ...]
) -> Iterator[tuple[str, Stored]]:
    """The states of every parameter that lies in a bucket, parameter by parameter."""
    for b, buffer in enumerate(strategy.buffers):
        checked = {
            name: _checked(strategy, paths, name, shards[name], bucket)
            for k, bucket in enumerate(buffer.buckets)
            for prefix in prefixes
            for name in [f"{prefix}buffer_{b}_bucket_{k}"]
        }
        for slot in buffer.slots:
            for prefix in prefixes:
                whole = checked[f"{prefix}buffer_{b}_bucket_{slot.bucket}"]
                yield prefix + slot.name, _cut_out(slot, whole, buffer.buckets[slot.bucket])


def _checked(
    strategy: Strategy, paths: list[Path], name: str, entries: _Entries, bucket: Bucket
) -> list[Stored]:
    """The ranks' parts of a bucket. Raises RefusedError for one that is missing or is none."""
    size, shards = (bucket.end - bucket.start) // len(paths), []
    for path, shard in zip(paths, entries, strict=True):
        if not isinstance(shard, Stored):
            raise RefusedError(
                f"{path}: has no {name}, which {strategy.file} asks for; it is of another run, or "
                f"no "
                "distributed optimizer's" + ("; or --no-save-optim" if "." in name else "")
            )
        if shard.shape != (size,) or shard.dtype != "float32":
            raise RefusedError(
                f"{path}: {name} is {shard.dtype} {list(shard.shape)} and not float32 [{size}], a "
                f"part of {len(paths)} of the bucket in {strategy.file}; they are of different runs"
            )
        shards.append(shard)
    return shards


def _cut_out(slot: Slot, shards: list[Stored], bucket: Bucket) -> Stored:
    """The parameter's elements, from as many of the ranks' parts of its bucket as it lies in."""
    size, itemsize = shards[0].numel, ITEMSIZE[shards[0].dtype]
    low, high = slot.start - bucket.start, slot.end - bucket.start
    extents: list[Extent] = []
    for start, shard in zip(range(0, size * len(shards), size), shards, strict=True):
        begin, end = max(low, start), min(high, start + size)
        if begin < end:
            extents += _run(shard, (begin - start) * itemsize, (end - start) * itemsize)
    return Stored(shards[0].dtype, slot.shape, tuple(extents))


def _run(stored: Stored, low: int, high: int) -> Iterator[Extent]:
    """The bytes [low, high) of a tensor."""
    position = 0
    for extent in stored.extents:
        begin, end = max(low, position), min(high, position + extent.nbytes)
        if begin < end:
            yield Extent(extent.file, extent.offset + begin - position, end - begin)
        position += extent.nbytes


def _stacked(name: str, paths: list[Path], entries: _Entries) -> Stored:
    """A ZeRO-3 tensor from the ranks' parts of its dim 0."""
    parts: list[Stored] = []
    for path, part in zip(paths, entries, strict=True):
        if not isinstance(part, Stored) or not part.shape:
            raise RefusedError(
                f"{path}: has no part of the ZeRO-3 parameter {name}; it is of another run"
            )
        parts.append(part)
        if (part.dtype, part.shape) != (parts[0].dtype, parts[0].shape):
            raise RefusedError(
                f"{path}: its part of {name} is {part.dtype} {list(part.shape)}, that of "
                f"{paths[0]} {parts[0].dtype} {list(parts[0].shape)}; they are of different runs"
            )
    rows, *rest = parts[0].shape
    return Stored(
        parts[0].dtype, (rows * len(parts), *rest), tuple(e for part in parts for e in part.extents)
    )


def read_strategy(path: Path, rank: int) -> Strategy:
    """Read a strategy file, which rank `rank` wrote.

    MindSpeed-Core-MS overwrites it in place and does not cut it, so the end of a longer, older one
    may follow. Raises RefusedError if it is damaged, contradicts itself, or leaves room in a bucket
    that no parameter fills."""
    data = json_document.read(
        path,
        json_document.check_of("strategy"),
        "take the one that the training run wrote",
        is_followed=True,
    )
    try:
        ranks = tuple(sorted(data["dp_rank_list"]))
        buffers = tuple(_buffer(data, b) for b in range(len(data["buffer_info"])))
        zero3 = tuple(data.get("zero3_params", ()))
    except (ValueError, KeyError) as error:
        raise RefusedError(
            f"{path}: no description of a distributed optimizer's shards, or damaged ({error!r}); "
            f"take the one that the training run wrote"
        ) from error
    if rank not in ranks or len(set(ranks)) != len(ranks):
        raise RefusedError(
            f"{path}: says that the data parallel group is {list(ranks)}, which is not rank "
            f"{rank}'s"
        )
    if not buffers and not zero3:
        raise RefusedError(f"{path}: describes no parameter at all")
    for b, buffer in enumerate(buffers):
        _check_buffer(f"{path}: buffer {b}", buffer, len(ranks))
    return Strategy(path, ranks, buffers, zero3)


def _buffer(data: dict[str, Any], number: int) -> StrategyBuffer:
    """Raises ValueError or KeyError where the entries contradict each other."""
    info = data["buffer_info"][str(number)]
    buckets, start = [], 0
    for k in range(info["bucket_num"]):
        numel, unpadded = info["buckets"][str(k)]
        buckets.append(Bucket(start, start + numel, unpadded))
        start += numel
    if len(buckets) != len(info["buckets"]) or start != info["buffer_size"]:
        raise ValueError(
            f"buffer {number} has {info['buffer_size']} elements, its {len(buckets)} buckets "
            f"{start}"
        )
    slots = []
    for name, entry in data["param_info"].items():
        buffer, bucket, first, end = entry["range_map"]
        if not 0 <= buffer < len(data["buffer_info"]):
            raise ValueError(f"{name} lies in buffer {buffer}, which is not described")
        if buffer == number:
            if bucket >= len(buckets):
                raise ValueError(f"{name} lies in bucket {bucket}, which is not described")
            shape = tuple(entry["shape"])
            slots.append(Slot(name, shape, entry["dtype"], first, end, bucket))
    return StrategyBuffer(
        param_dtype=slots[0].dtype if slots else None,
        buckets=tuple(buckets),
        slots=tuple(slots),
    )


def _check_buffer(where: str, buffer: StrategyBuffer, dp: int) -> None:
    """Every slot must fill its shape, lie in the saved and used part of its bucket, and follow the
    one before it."""
    for k, bucket in enumerate(buffer.buckets):
        slots = sorted(
            (slot for slot in buffer.slots if slot.bucket == k), key=lambda slot: slot.start
        )
        used, position = bucket.start + bucket.numel_unpadded, bucket.start
        saved = bucket.start + (bucket.end - bucket.start) // dp * dp
        for slot in slots:
            fits = position <= slot.start and slot.end <= min(used, bucket.end)
            if not fits or slot.end - slot.start != math.prod(slot.shape):
                raise RefusedError(
                    f"{where}: {slot.name} {list(slot.shape)} cannot lie at elements {slot.start} "
                    f"to {slot.end} of bucket {k}; the file is damaged"
                )
            if slot.end > saved:
                raise RefusedError(
                    f"{where}: bucket {k} is no multiple of dp {dp}, so no rank saved the last "
                    f"{slot.end - saved} elements of {slot.name}; train with enable_mem_align"
                )
            _check_gap(where, position, slot.start, buffer)
            position = slot.end
        _check_gap(where, position, used, buffer)
    strays = [slot.name for slot in buffer.slots if not 0 <= slot.bucket < len(buffer.buckets)]
    if strays:
        raise RefusedError(
            f"{where}: {shorten_names(strays)} lies in a bucket that is not described; the file is "
            f"damaged"
        )


def _check_gap(where: str, start: int, end: int, buffer: StrategyBuffer) -> None:
    if (end - start) * ITEMSIZE.get(buffer.param_dtype or "float32", 4) > _MAX_GAP_BYTES:
        raise RefusedError(
            f"{where}: elements {start} to {end} belong to no parameter, which is more than "
            f"alignment leaves free; a parameter is missing in the file"
        )
