"""Frameworks: which folders and files a checkpoint of each consists of, and which rank writes
what."""

from __future__ import annotations

from pathlib import Path

from parammap.checkpoint import completeness
from parammap.checkpoint.architecture import ARCHITECTURES
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.frameworks.alpa import architecture as alpa_architecture
from parammap.frameworks.alpa import reader as alpa_source
from parammap.frameworks.deepspeed import architecture as deepspeed_architecture
from parammap.frameworks.deepspeed import reader as deepspeed
from parammap.frameworks.megatron import architecture as megatron_architecture
from parammap.frameworks.megatron import reader as megatron
from parammap.frameworks.megatron_dist import reader as megatron_dist
from parammap.frameworks.merak import architecture as merak_architecture
from parammap.frameworks.merak import reader as merak
from parammap.frameworks.metaseq import architecture as metaseq_architecture
from parammap.frameworks.metaseq import reader as metaseq
from parammap.frameworks.mindspore import reader as mindspore_source
from parammap.frameworks.transformers import architecture as transformers_architecture
from parammap.frameworks.transformers import reader as transformers_source
from parammap.gc_pause import gc_paused
from parammap.tensors.layout import Numbering

#: readers in the order in which they are asked whether a folder is theirs; the last one explains
#: what is missing
READERS = (
    merak,
    mindspore_source,
    megatron_dist,
    alpa_source,
    deepspeed,
    transformers_source,
    metaseq,
    megatron,
)
#: what else a reader can be told
_LENT = {metaseq: ("metadata_from", "ema"), merak: ("metadata_from",)}
ARCHITECTURES.update(
    {
        "megatron": megatron_architecture.of,
        "megatron-dist": megatron_architecture.of,
        "mindspore": megatron_architecture.of,
        "metaseq": metaseq_architecture.of,
        "alpa": alpa_architecture.of,
        "deepspeed": deepspeed_architecture.of,
        "merak": merak_architecture.of,
        "transformers": transformers_architecture.of,
    }
)


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
    sizes = sizes or {}
    reader = next((reader for reader in READERS if reader.recognizes(source)), READERS[-1])
    lent = {"metadata_from": metadata_from, "ema": ema}
    taken = {name: lent[name] for name in _LENT.get(reader, ())}
    if foreign := [name for name, value in lent.items() if value and name not in taken]:
        raise RefusedError(
            f"{source}: is no checkpoint that takes --{foreign[0].replace('_', '-')}; leave it out"
        )
    checkpoint = reader.read(
        source,
        iteration=iteration,
        sidecar_folder=sidecar,
        weights_only=weights_only,
        drop=drop,
        numbering=Numbering(sizes.get("dp"), sizes.get("cp"), noop, suffix),
        **taken,
    )
    completeness.check(checkpoint)
    for name, size in sizes.items():
        there = getattr(checkpoint.layout, name)
        if name not in ("dp", "cp") and size != there:
            raise RefusedError(
                f"{source}: was saved with {name} {there} and not {size}; leave the size out"
            )
    return checkpoint
