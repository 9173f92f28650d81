"""The frameworks that the house knows, a line for each; and the checkpoint of whichever of them a
path holds."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from parammap.checkpoint import completeness
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.execute.gc_pause import gc_paused
from parammap.frameworks.alpa.framework import ALPA
from parammap.frameworks.deepspeed.framework import DEEPSPEED
from parammap.frameworks.framework import Framework, ReadOptions
from parammap.frameworks.megatron.framework import MEGATRON
from parammap.frameworks.megatron_dist.framework import MEGATRON_DIST
from parammap.frameworks.merak.framework import MERAK
from parammap.frameworks.metaseq.framework import METASEQ
from parammap.frameworks.mindspore.framework import MINDSPORE
from parammap.frameworks.target import Target
from parammap.frameworks.transformers.framework import TRANSFORMERS
from parammap.tensors.layout import Numbering

#: in the order in which they are asked whether a path is theirs; the last one explains what is
#: missing
_FRAMEWORKS = [
    MERAK,
    MINDSPORE,
    MEGATRON_DIST,
    ALPA,
    DEEPSPEED,
    TRANSFORMERS,
    METASEQ,
    MEGATRON,
]
#: what can be left out of a checkpoint
DROPPABLE = {"experts"}


def register(framework: Framework) -> None:
    """Add a framework, which is asked before those that are there. Raises ValueError if its name,
    that of a target or that of a flag stands for something else already."""
    there = _targets_of(_FRAMEWORKS)
    flags = {flag.name: flag for target in there.values() for flag in target.all_flags}
    taken = [
        *(one.name for one in _FRAMEWORKS if one.name == framework.name),
        *(one.name for one in framework.targets if one.name in there),
        *(
            flag.name
            for one in framework.targets
            for flag in one.all_flags
            if flags.get(flag.name, flag) != flag
        ),
    ]
    if taken:
        raise ValueError(f"{framework.name}: {', '.join(taken)}: there is another one already")
    _FRAMEWORKS.insert(0, framework)


def unregister(name: str) -> None:
    """Remove a framework that was registered."""
    _FRAMEWORKS.remove(framework(name))


@cache
def _load_installed() -> None:
    """Register what installed packages add by entry points. The search for them takes a while, so
    it waits until more is asked for than a name that is built in."""
    for point in entry_points(group="parammap.frameworks"):
        register(point.load())


def frameworks() -> tuple[Framework, ...]:
    """All frameworks, by name."""
    _load_installed()
    return tuple(sorted(_FRAMEWORKS, key=lambda framework: framework.name))


def framework(name: str) -> Framework:
    """The framework of that name, such as `Checkpoint.framework`."""
    known = {one.name: one for one in _FRAMEWORKS}
    if name not in known:
        known = {one.name: one for one in frameworks()}
    if name not in known:
        raise RefusedError(f"{name}: no such framework; known are {', '.join(known)}")
    return known[name]


def targets() -> dict[str, Target]:
    """All that can be written, by name."""
    return dict(sorted(_targets_of(frameworks()).items()))


def target(name: str) -> Target:
    """What is written with `--to name`."""
    found = _targets_of(_FRAMEWORKS)
    if name not in found:
        found = targets()
    if name not in found:
        raise RefusedError(f"{name}: cannot be written; what can be is {', '.join(found)}")
    return found[name]


def _targets_of(frameworks: Iterable[Framework]) -> dict[str, Target]:
    return {target.name: target for framework in frameworks for target in framework.targets}


def recognized(source: Path) -> Framework:
    """The framework whose checkpoint a path holds; if none says so, the one that explains what is
    missing. Those of installed packages are asked before those that are built in."""
    _load_installed()
    return next((one for one in _FRAMEWORKS if one.recognizes(source)), _FRAMEWORKS[-1])


@gc_paused()
def read(
    source: Path,
    *,
    iteration: int | None = None,
    sidecar: Path | None = None,
    weights_only: bool = False,
    drop: frozenset[str] = frozenset(),
    sizes: dict[str, int] | None = None,
    noop: frozenset[int] = frozenset(),
    suffix: str | None = None,
    metadata_from: Path | None = None,
    ema: bool = False,
) -> Checkpoint:
    """Read a checkpoint of whatever framework it is.

    `sizes` is what the user says of its layout: dp and cp number MindSpore's rank folders, the
    others are checked. `noop` are the layers that do nothing, which MindSpeed-Core-MS counts and
    Megatron-LM does not have; `suffix` (.ckpt or .safetensors) chooses among its files.
    `metadata_from` is where metaseq's flat parameters are described whose files lost it, or a
    config.json of what Merak saved without one; `ema` asks for the averaged weights in metaseq's
    files. Raises RefusedError if it is no checkpoint, damaged, or of other sizes."""
    if unknown := drop - DROPPABLE:
        raise RefusedError(f"drop {', '.join(sorted(unknown))}: only experts can be left out")
    sizes = sizes or {}
    found = recognized(source)
    lent = {"metadata_from": metadata_from, "ema": ema}
    if foreign := [name for name, value in lent.items() if value and name not in found.takes]:
        raise RefusedError(
            f"{source}: is no checkpoint that takes --{foreign[0].replace('_', '-')}; leave it out"
        )
    options = ReadOptions(
        iteration=iteration,
        sidecar_folder=sidecar,
        weights_only=weights_only,
        drop=drop,
        numbering=Numbering(sizes.get("dp"), sizes.get("cp"), noop, suffix),
        metadata_from=metadata_from,
        ema=ema,
    )
    checkpoint = found.read(source, options)
    checkpoint.describe = found.architecture
    completeness.check(checkpoint)
    for name, size in sizes.items():
        there = getattr(checkpoint.layout, name)
        if name not in ("dp", "cp") and size != there:
            raise RefusedError(
                f"{source}: was saved with {name} {there} and not {size}; leave the size out"
            )
    return checkpoint
