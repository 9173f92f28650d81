"""What a conversion wrote of a distributed optimizer, read as the release will: by its own rule, in
its model's own order.

The plan takes what lies where from the source. Here it is derived anew, from the names in the model
file that was written, the order in which Megatron-LM registers them and its rule for buckets; what
lies there must be the model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.checkpoint.index import TensorEntry
from parammap.checkpoint.sidecar import Buffer, RankSidecar, Sidecar
from parammap.errors import RefusedError
from parammap.execute.checks import cast_bits
from parammap.execute.gather import Files
from parammap.frameworks.megatron import before_core, optimizer, registration
from parammap.frameworks.megatron.buckets import Rule
from parammap.frameworks.megatron.facts import args_of
from parammap.frameworks.megatron.files import MODEL_FILE, OPTIMIZER_FILE, read_rank
from parammap.frameworks.megatron.structure import rank_folder
from parammap.tensors.layout import Place
from parammap.tensors.logical import MAIN_PARAM, Stored
from parammap.tensors.region import Region
from parammap.tensors.shard import views_of

_ELEMENTS = 1 << 20


def check(root: Path, written: Checkpoint) -> None:
    """Refuse files below `root` that the release would read otherwise than they were meant;
    `written` is what they hold."""
    folders = {rank: rank_folder(written.layout, rank) for rank in written.rank_folders}
    if found := _first_misfit(
        written, [(rank, one) for rank, name in folders.items() for one in root.glob(f"*/{name}")]
    ):
        raise RefusedError(
            f"{found}; nothing was written: this is a defect of ParamMap, please report it"
        )


def wrong_order(output: Checkpoint, is_written_here: bool) -> list[tuple[str, str]]:
    """Where, and what, of buffers whose parameters do not lie where Megatron-LM's model will look
    for them. Files that a run saved (not `is_written_here`) may hold weights that are stale."""
    wrong = misplaced(output)
    if is_written_here and not wrong:
        found = _first_misfit(output, list(output.rank_folders.items()))
        return [(str(output.folder), found)] if found else []
    return wrong


def misplaced(output: Checkpoint, _is_written_here: bool = True) -> list[tuple[str, str]]:
    """The same, by the sidecar alone."""
    if output.sidecar and (wrong := registration.misplaced(output.sidecar)):
        return [(str(output.sidecar.folder), wrong)]
    return []


def _first_misfit(checkpoint: Checkpoint, folders: list[tuple[Coordinates, Path]]) -> str | None:
    """The first parameter of the first rank that has an optimizer whose weight is not the model's,
    as a line to print."""
    ranks = checkpoint.sidecar.ranks if checkpoint.sidecar else {}
    for rank, folder in folders:
        if (
            (folder / OPTIMIZER_FILE).is_file()
            and (folder / MODEL_FILE).is_file()
            and rank in ranks
        ):
            return _misfit(checkpoint, ranks[rank], rank, folder)
    return None


def _misfit(
    checkpoint: Checkpoint, known: RankSidecar, rank: Coordinates, folder: Path
) -> str | None:
    saved = read_rank(folder, Place(*rank))
    model = saved.tensors()
    own = before_core.sidecar_of(folder, [saved]) or Sidecar(
        folder,
        {rank: replace(known, optimizers=_by_rule(checkpoint, known, rank, model))},
        complete=True,
    )
    states = optimizer.read_rank(folder, Place(*rank), model, own, frozenset())
    copies = {(one.place, one.name): one.stored for one in model}
    with Files() as files:
        for state in states:
            if state.state == MAIN_PARAM:
                element = _first_unequal(state.stored, copies[state.place, state.name], files)
                if element is not None:
                    return (
                        f"{folder / OPTIMIZER_FILE}: where Megatron-LM will look for {state.name}, "
                        f"element {element} is not that of {MODEL_FILE}"
                    )
    return None


def _by_rule(
    checkpoint: Checkpoint, known: RankSidecar, rank: Coordinates, model: list[TensorEntry]
) -> tuple[tuple[Buffer, ...] | None, ...]:
    """The optimizers' buffers as the release lays them out; as recorded, where the run's own hook
    did that."""
    if registration.is_recorded(known.layout):
        return known.optimizers
    buffers = [buffer for optimizers in known.optimizers for buffer in optimizers or ()]
    slots = {(buffer.chunk, slot.name): slot for buffer in buffers for slot in buffer.slots}
    sequences = (
        []
        if all(registration.place_of(name) for _, name in slots)
        else registration.recorded(checkpoint.sidecar)
    )
    chunks = [
        [
            slots[number, name]
            for name in registration.in_order([one.name for one in found], sequences)
            if (number, name) in slots
        ]
        for number, found in _by_chunk(model)
    ]
    rule = Rule.of(known.layout, args_of(checkpoint.rank_metadata[rank]), checkpoint.layout)
    grads = {buffer.param_dtype: buffer.grad_dtype for buffer in buffers if buffer.param_dtype}
    return rule.optimizers(chunks, Place(*rank), grads, any(slot.expert for slot in slots.values()))


def _by_chunk(model: list[TensorEntry]) -> Iterator[tuple[int, list[TensorEntry]]]:
    for number, found in groupby(model, key=lambda one: one.place.vpp):
        yield number, list(found)


def _first_unequal(weight: Stored, copy: Stored, files: Files) -> int | None:
    """The first element of a model's copy that is not the cast of the optimizer's float32
    weight."""
    ((main, _),), ((own, _),) = views_of(weight), views_of(copy)
    for first in range(0, copy.numel, _ELEMENTS):
        run = Region((first,), (min(_ELEMENTS, copy.numel - first),))
        bits, there = files.bits(main.narrow(run)), files.bits(own.narrow(run))
        unequal = (bits if copy.dtype == "float32" else cast_bits(bits, copy.dtype)) != there
        if unequal.any():
            return first + int(unequal.argmax())
    return None
