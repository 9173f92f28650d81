"""Frameworks: which folders and files a checkpoint of each consists of, and which rank writes what."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import Checkpoint
from ..errors import RefusedError
from ..garbage import no_collection
from ..layout import Numbering
from .alpa import reader as alpa_source
from .megatron import reader as megatron
from .megatron_dist import reader as megatron_dist
from .metaseq import reader as metaseq
from .mindspore import reader as mindspore_source

#: readers in the order in which they are asked whether a folder is theirs; the last one explains what is missing
READERS = (mindspore_source, megatron_dist, alpa_source, metaseq, megatron)


@no_collection()
def read(source: Path, *, iteration: int | None = None, sidecar: Path | None = None, weights_only: bool = False,
         drop: frozenset[str] = frozenset(), sizes: dict[str, int] | None = None,
         noop: frozenset[int] = frozenset(), suffix: str | None = None, metadata_from: Path | None = None,
         ema: bool = False) -> Checkpoint:
    """Read a checkpoint of whatever framework it is.

    `sizes` is what the user says of its layout: dp and cp number MindSpore's rank folders, the others are checked. `noop`
    are the layers that do nothing, which MindSpeed-Core-MS counts and Megatron-LM does not have; `suffix` (.ckpt or
    .safetensors) chooses among its files. `metadata_from` is where metaseq's flat parameters are described whose files lost
    it, and `ema` asks for the averaged weights in them.
    Raises RefusedError if it is no checkpoint, damaged, or of other sizes.
    """
    sizes = sizes or {}
    reader = next((reader for reader in READERS if reader.recognizes(source)), READERS[-1])
    checkpoint = reader.read(source, iteration=iteration, sidecar_folder=sidecar, weights_only=weights_only, drop=drop,
                             numbering=Numbering(sizes.get("dp"), sizes.get("cp"), noop, suffix),
                             **({"metadata_from": metadata_from, "ema": ema} if reader is metaseq else {}))
    if (metadata_from or ema) and reader is not metaseq:
        raise RefusedError(f"{source}: is no checkpoint of metaseq, to which alone metadata and averaged weights belong")
    for name, size in sizes.items():
        there = getattr(checkpoint.layout, name)
        if name not in ("dp", "cp") and size != there:
            raise RefusedError(f"{source}: was saved with {name} {there} and not {size}; leave the size out")
    return checkpoint
