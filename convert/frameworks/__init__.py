"""Frameworks: which folders and files a checkpoint of each consists of, and which rank writes what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .. import completeness
from ..architecture import Architecture, check_family
from ..checkpoint import Checkpoint
from ..errors import RefusedError
from ..garbage import no_collection
from ..layout import Numbering
from .alpa import architecture as alpa_architecture
from .alpa import reader as alpa_source
from .deepspeed import architecture as deepspeed_architecture
from .deepspeed import reader as deepspeed
from .megatron import architecture as megatron_architecture
from .megatron import reader as megatron
from .megatron_dist import reader as megatron_dist
from .merak import architecture as merak_architecture
from .merak import reader as merak
from .metaseq import architecture as metaseq_architecture
from .metaseq import reader as metaseq
from .mindspore import reader as mindspore_source
from .transformers import architecture as transformers_architecture
from .transformers import reader as transformers_source

#: readers in the order in which they are asked whether a folder is theirs; the last one explains what is missing
READERS = (merak, mindspore_source, megatron_dist, alpa_source, deepspeed, transformers_source, metaseq, megatron)
#: what else a reader can be told
_LENT = {metaseq: ("metadata_from", "ema"), merak: ("metadata_from",)}
#: by framework: what tells the architecture of one of its checkpoints
ARCHITECTURES: dict[str, Callable[[Checkpoint], Architecture]] = {
    "megatron": megatron_architecture.of,
    "megatron-dist": megatron_architecture.of,
    "mindspore": megatron_architecture.of,
    "metaseq": metaseq_architecture.of,
    "alpa": alpa_architecture.of,
    "deepspeed": deepspeed_architecture.of,
    "merak": merak_architecture.of,
    "transformers": transformers_architecture.of,
}


@no_collection()
def read(source: Path, *, iteration: int | None = None, sidecar: Path | None = None, weights_only: bool = False,
         drop: frozenset[str] = frozenset(), sizes: dict[str, int] | None = None,
         noop: frozenset[int] = frozenset(), suffix: str | None = None, metadata_from: Path | None = None,
         ema: bool = False) -> Checkpoint:
    """Read a checkpoint of whatever framework it is.

    `sizes` is what the user says of its layout: dp and cp number MindSpore's rank folders, the others are checked. `noop`
    are the layers that do nothing, which MindSpeed-Core-MS counts and Megatron-LM does not have; `suffix` (.ckpt or
    .safetensors) chooses among its files. `metadata_from` is where metaseq's flat parameters are described whose files lost
    it, or a config.json of what Merak saved without one; `ema` asks for the averaged weights in metaseq's files.
    Raises RefusedError if it is no checkpoint, damaged, or of other sizes.
    """
    sizes = sizes or {}
    reader = next((reader for reader in READERS if reader.recognizes(source)), READERS[-1])
    lent = {"metadata_from": metadata_from, "ema": ema}
    taken = {name: lent[name] for name in _LENT.get(reader, ())}
    if foreign := [name for name, value in lent.items() if value and name not in taken]:
        raise RefusedError(f"{source}: is no checkpoint that takes --{foreign[0].replace('_', '-')}; leave it out")
    checkpoint = reader.read(source, iteration=iteration, sidecar_folder=sidecar, weights_only=weights_only, drop=drop,
                             numbering=Numbering(sizes.get("dp"), sizes.get("cp"), noop, suffix), **taken)
    completeness.check(checkpoint)
    for name, size in sizes.items():
        there = getattr(checkpoint.layout, name)
        if name not in ("dp", "cp") and size != there:
            raise RefusedError(f"{source}: was saved with {name} {there} and not {size}; leave the size out")
    return checkpoint


def architecture_of(checkpoint: Checkpoint, activation: str | None = None) -> Architecture:
    """What a checkpoint's model computes; `activation` is the user's word for one that records none.

    Raises RefusedError for a model that has no architecture in common with another framework's, and where the user's word
    and the record differ.
    """
    known = ARCHITECTURES[checkpoint.framework](checkpoint)
    if activation and known.activation not in (None, activation):
        raise RefusedError(f"{checkpoint.folder}: its activation is {known.activation} and not {activation}; leave "
                           "--activation out")
    return replace(known, activation=activation or known.activation)


def architecture_for(checkpoint: Checkpoint, families: tuple[str, ...], target: str,
                     activation: str | None = None) -> Architecture:
    """What a checkpoint's model computes, which the target framework, that has only those families, shall compute as well.

    Raises RefusedError for another family, and for settings that make the model compute otherwise than its family does.
    """
    known = architecture_of(checkpoint, activation)
    check_family(checkpoint, known.family, families, target)
    if known.unlike:
        raise RefusedError(f"{checkpoint.folder}: has {', '.join(known.unlike)}, which {target} does not compute; only "
                           "transformers itself has such a model")
    return known
