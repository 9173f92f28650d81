"""The frameworks that can be written for: who plans their files, with which options, and what a
layout means to each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from parammap.checkpoint.architecture import BLOOM, GPT2, LLAMA, MIXTURE, OPT, YUAN
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.frameworks.alpa import serving as alpa
from parammap.frameworks.alpa import training as alpa_training
from parammap.frameworks.deepspeed import target as deepspeed
from parammap.frameworks.megatron import import_model as megatron_adopt
from parammap.frameworks.megatron import readback
from parammap.frameworks.megatron import target as megatron
from parammap.frameworks.megatron.reshard import resharded
from parammap.frameworks.megatron.specification import Options as Specified
from parammap.frameworks.megatron_dist import target as megatron_dist
from parammap.frameworks.merak import target as merak
from parammap.frameworks.metaseq import import_model as metaseq_adopt
from parammap.frameworks.metaseq import reshard as metaseq_relayout
from parammap.frameworks.metaseq import target as metaseq
from parammap.frameworks.mindspore import target as mindspore
from parammap.frameworks.transformers import target as transformers
from parammap.plan.plan import Output
from parammap.tensors.layout import TargetLayout


@dataclass(frozen=True, slots=True)
class Plain:
    """The options of a framework that has none of its own."""

    cast: None = None


@dataclass(frozen=True, slots=True)
class Target:
    """`output` plans the files of a checkpoint in the layout wanted; `options` is the type of its
    second argument, which takes the `sizes` of the layout that change no tensor of a rank, or all
    of them where the framework cuts for itself.

    `native` are the frameworks whose checkpoints it takes as they are (empty: any), `adopted`
    presents those of others as its own, by the options, and `relaid` lays them out anew; without it
    the files are the same for every layout.

    `check` reads again what was written below a folder, and raises RefusedError where the framework
    would not find there what the checkpoint holds.

    `families` are those of the models that the framework has, and `optimizer` says whether its
    files have room for, and `needs_optimizer` that they make no sense without, the optimizer's
    states."""

    output: Callable[[Checkpoint, Any], Output]
    options: type = Plain
    native: tuple[str, ...] = ()
    import_model: Callable[[Checkpoint, Any], Checkpoint] | None = None
    resharded: Callable[[Checkpoint, TargetLayout], Checkpoint] | None = None
    check: Callable[[Path, Checkpoint], None] | None = None
    sizes: Mapping[str, str] = field(default_factory=dict)
    families: tuple[str, ...] = ()
    optimizer: bool = True
    needs_optimizer: bool = False

    def wanted(
        self,
        source: Checkpoint,
        options: Any,
        target_sizes: dict[str, int],
        stage_layers: tuple[int, ...],
        divisible_by: int | None,
    ) -> Checkpoint:
        """The source in the layout wanted: itself, if that is its own, or if the files are the same
        for every layout."""
        if self.native and source.framework not in self.native:
            source = self._import(source, options)
        if self.resharded is None:
            return source
        there = source.trained or source.layout
        layout = replace(there, **target_sizes)
        if "tp" in target_sizes and "etp" not in target_sizes:
            layout = replace(layout, etp=layout.tp)
        changed = {name for name, size in target_sizes.items() if size != getattr(there, name)}
        unchanged_stages = not stage_layers or (
            there.vpp == 1 and stage_layers == tuple(source.stage_layers())
        )
        if (
            source.trained is None
            and changed <= set(self.sizes)
            and unchanged_stages
            and divisible_by is None
        ):
            return source
        return self.resharded(
            source,
            TargetLayout(layout=layout, stage_layers=stage_layers, divisible_by=divisible_by),
        )

    def files(self, target: Checkpoint, options: Any, target_sizes: dict[str, int]) -> Output:
        """Plan the files of a checkpoint that is `wanted`."""
        return self.output(
            target,
            replace(options, **{name: target_sizes.get(size) for size, name in self.sizes.items()}),
        )

    def _import(self, source: Checkpoint, options: Any) -> Checkpoint:
        if self.import_model is None:
            raise RefusedError(
                f"{source.folder}: is {source.framework}'s, and only checkpoints of "
                f"{' and '.join(self.native)} can be written so; `parammap formats` lists what "
                f"goes where"
            )
        return self.import_model(source, options)


def _as_megatrons(source: Checkpoint, options: Any) -> Checkpoint:
    return megatron_adopt.import_model(source, options.transformer_impl)


_MEGATRON = ("megatron", "megatron-dist", "mindspore")
TARGETS = {
    "mindspore": Target(
        mindspore.output,
        mindspore.Options,
        _MEGATRON,
        _as_megatrons,
        resharded,
        sizes={"dp": "dp", "cp": "cp"},
        families=(GPT2, LLAMA, MIXTURE),
    ),
    "megatron": Target(
        megatron.output,
        Specified,
        _MEGATRON,
        _as_megatrons,
        resharded,
        readback.check,
        families=(GPT2, LLAMA, MIXTURE, YUAN),
    ),
    "megatron-dist": Target(
        megatron_dist.output,
        megatron_dist.Options,
        _MEGATRON,
        _as_megatrons,
        sizes={"ep": "ep"},
        families=(GPT2, LLAMA, MIXTURE),
    ),
    "metaseq": Target(
        metaseq.output,
        metaseq.Options,
        ("metaseq",),
        lambda source, _: metaseq_adopt.import_model(source),
        metaseq_relayout.resharded,
        sizes={"dp": "shards"},
        families=(OPT,),
    ),
    "alpa": Target(alpa.output, alpa.Options, families=(OPT, BLOOM), optimizer=False),
    "merak": Target(
        merak.output,
        merak.Options,
        sizes={"tp": "tp", "pp": "pp"},
        families=(GPT2,),
        optimizer=False,
    ),
    "alpa-training": Target(
        alpa_training.output, alpa_training.Options, families=(GPT2, OPT), needs_optimizer=True
    ),
    "deepspeed": Target(deepspeed.output, families=(GPT2, BLOOM), needs_optimizer=True),
    "transformers": Target(
        transformers.output, transformers.Options, families=transformers.FAMILIES, optimizer=False
    ),
}
