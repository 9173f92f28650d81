"""What can be written for a framework: who plans the files, with which options, and what a layout
means to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.frameworks.flags import FORMAT, Flag
from parammap.plan.plan import Output
from parammap.tensors.layout import TargetLayout


@dataclass(frozen=True, slots=True)
class Plain:
    """The options of a target that has none of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`output` plans the files of a checkpoint in the layout wanted; `options` is the type of its
    second argument, a dataclass whose fields `flags` set. It also takes the `sizes` of the layout
    that change no tensor of a rank, or all of them where the framework cuts for itself: by name,
    the field that a size sets. `formats` are the file formats to choose from with --format, if
    there are several.

    `native` are the frameworks whose checkpoints it takes as they are (empty: any), `import_model`
    presents those of others as its own, by the options, and `resharded` lays them out anew; without
    it the files are the same for every layout.

    `state_dict` are the options with which files hold a model's tensors whole, by the names of its
    state dict; None: they never do.

    `check` reads again what was written below a folder, and raises RefusedError where the framework
    would not find there what the checkpoint holds.

    `families` are those of the models that can be written (None: the framework's), and `optimizer` says whether its
    files have room for, and `needs_optimizer` that they make no sense without, the optimizer's
    states. `weights_only_dtypes` are the dtypes that weights alone can be cast to, where the
    optimizer's states are to keep theirs (None: any, and weights with their states)."""

    name: str
    output: Callable[[Checkpoint, Any], Output]
    families: Callable[[], tuple[str, ...]] | None = None
    options: Callable[..., Any] = Plain
    flags: tuple[Flag, ...] = ()
    formats: tuple[str, ...] = ()
    native: tuple[str, ...] = ()
    import_model: Callable[[Checkpoint, Any], Checkpoint] | None = None
    resharded: Callable[[Checkpoint, TargetLayout], Checkpoint] | None = None
    state_dict: Mapping[str, object] | None = None
    check: Callable[[Path, Checkpoint], None] | None = None
    sizes: Mapping[str, str] = field(default_factory=dict)
    optimizer: bool = True
    needs_optimizer: bool = False
    weights_only_dtypes: tuple[str, ...] | None = None

    @property
    def all_flags(self) -> tuple[Flag, ...]:
        return (FORMAT, *self.flags) if self.formats else self.flags

    def wanted(
        self,
        source: Checkpoint,
        options: Any,
        target_sizes: dict[str, Any],
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
