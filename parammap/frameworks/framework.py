"""What the house knows of a framework: one record, which its own folder makes and registry.py
lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.errors import RefusedError
from parammap.families import Architecture
from parammap.frameworks.target import Target
from parammap.tensors.arrangement import Sizes
from parammap.tensors.layout import AS_RECORDED, Numbering
from parammap.tensors.logical import MAIN_PARAM

#: why the optimizer's states cannot be read, and what to drop (--drop) so that the rest of them can
#: be
Unreadable = tuple[str, frozenset[str]]


def _no_states(weights: Checkpoint, error: RefusedError) -> Unreadable:
    return str(error), frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What a run recorded of its model, in its sidecar or its arguments (`with_args`): `settings` by
    Megatron-LM's names, and the `sizes` that they tell."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    sizes: Sizes = Sizes()
    with_args: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What `parammap inspect` asks of a framework.

    `title` is its name as people write it. `as_trained` says that a checkpoint is as its run held
    it, in chunks whose layers have numbers of their own, with that run's sidecar; else a sidecar
    tells of the run that the checkpoint was made from. `keeps_args` says that Megatron-LM's
    arguments are kept, and `file_kinds`, by name or ending, what each file of a rank is for (None:
    ranks share folders, whose files hold tensors). `weights_state` is what the weights are that are
    read without an optimizer.

    `unreadable` tells of a checkpoint of which the weights can be read, and the whole raised an
    error; None: a checkpoint of which the whole cannot be read has no weights that can be.

    `recorded` is what the run recorded of its model, and `flat_parameters` the parameters as FSDP
    holds them, by each rank's files. `layout` describes the sizes of a layout in words, and
    `sidecar` the files beside a checkpoint's own; None: as Megatron-LM has it."""

    title: str = ""
    as_trained: bool = False
    keeps_args: bool = False
    file_kinds: Mapping[str, str] | None = None
    weights_state: str = MAIN_PARAM
    unreadable: Callable[[Checkpoint, RefusedError], Unreadable] | None = _no_states
    recorded: Callable[[Checkpoint], Recorded] = lambda _: Recorded()
    layout: Callable[[Mapping[str, Any]], str] | None = None
    flat_parameters: Callable[[Checkpoint, dict[Coordinates, list[Path]]], list[dict[str, Any]]] = (
        lambda *_: []
    )
    sidecar: Callable[[Checkpoint, list[Path]], dict[str, Any] | None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """What of a checkpoint to read, and what a user says of it (see `registry.read`)."""

    iteration: int | None = None
    sidecar_folder: Path | None = None
    weights_only: bool = False
    drop: frozenset[str] = frozenset()
    numbering: Numbering = AS_RECORDED
    metadata_from: Path | None = None
    ema: bool = False


EVERYTHING = ReadOptions()


@dataclass(frozen=True, slots=True)
class Patch:
    """A file of parammap/patches that has a training write its sidecars, and what it applies to."""

    file: str
    applies_to: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Framework:
    """`recognizes` says whether a path is its checkpoint, and `read` reads one; `takes` are the
    options that only some readers have (metadata_from, ema). Checkpoints that are read
    hold models of the `families`, with the optimizer's states unless not `optimizer`;
    `architecture` tells what such a model computes, and `tied` whether its output layer is the word
    embedding, where the run recorded that. `targets` are what can be written for it.

    `contradictions` names tensors that have another shape than the checkpoint itself says, with
    what is wrong in words. `wrong_order` says where, and what, of an output that the framework
    would read otherwise than it was meant; its second argument is whether ParamMap wrote it."""

    name: str
    recognizes: Callable[[Path], bool]
    read: Callable[[Path, ReadOptions], Checkpoint]
    families: Callable[[], tuple[str, ...]]
    architecture: Callable[[Checkpoint], Architecture]
    tied: Callable[[Checkpoint], bool | None] = lambda _: None
    takes: tuple[str, ...] = ()
    optimizer: bool = True
    targets: tuple[Target, ...] = ()
    contradictions: Callable[[Checkpoint], Mapping[str, str]] = lambda _: {}
    wrong_order: Callable[[Checkpoint, bool], Iterable[tuple[str, str]]] = lambda *_: ()
    inspection: Inspection = Inspection()
    patch: Patch | None = None
