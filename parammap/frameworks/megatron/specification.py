"""Layer specifications of megatron-core: of which layers a model is made, and what its state dict
calls their tensors.

Transformer Engine's layers (--transformer-impl transformer_engine, the default) fuse a norm with
the linear layer behind it. Experts are modules of their own (SequentialMLP), parameters of one
module (TEGroupedMLP: --moe-grouped-gemm), or two tensors (GroupedMLP:
--moe-use-legacy-grouped-gemm, and grouped experts of local layers; both up to core 0.16).

Sources: Megatron-LM core_r0.12.0 … main, core/models/gpt/{gpt_layer_specs,moe_module_specs}.py,
core/models/backends.py, core/extensions/transformer_engine_spec_provider.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from parammap.checkpoint import extra_states
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.frameworks.megatron.facts import args_of
from parammap.frameworks.megatron.structure import leaves
from parammap.tensors.logical import TensorSpec

TRANSFORMER_ENGINE, LOCAL = "transformer_engine", "local"
CHOICES = (TRANSFORMER_ENGINE, LOCAL)
SEQUENTIAL, GROUPED, TWO_TENSORS = "sequential", "grouped", "two tensors"
_LEGACY_GROUPED = "moe_use_legacy_grouped_gemm"
#: names of experts as modules of their own, and all names that models of local layers call
#: otherwise in format torch_dist
_EXPERTS_APART = re.compile(r"\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias|_extra_state)$")
_LOCAL_NAMES = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
#: Transformer Engine's linear layers and norms, by the name of a tensor of theirs, and where its
#: attention stands
_OF_ENGINE = re.compile(
    r"(decoder\..+\.(?:linear_\w+|\w+_layernorm)|decoder\.final_layernorm)\.\w+$"
)
_PROJECTION, _ATTENTION = ".self_attention.linear_proj", ".self_attention.core_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`transformer_impl`: whose layers a model of another framework gets (None: Transformer
    Engine's)."""

    transformer_impl: str | None = None


@dataclass(frozen=True, slots=True)
class Specification:
    """`impl`: whose layers; `experts`: the form of a mixture's experts."""

    impl: str
    experts: str

    @classmethod
    def of(cls, args: dict[str, Any]) -> Specification:
        """What Megatron-LM builds by the arguments that it recorded; without any, Transformer
        Engine's layers."""
        impl = LOCAL if args.get("transformer_impl") == LOCAL else TRANSFORMER_ENGINE
        if not args.get("moe_grouped_gemm"):
            return cls(impl, SEQUENTIAL)
        if args.get(_LEGACY_GROUPED) or (impl == LOCAL and _LEGACY_GROUPED in args):
            return cls(impl, TWO_TENSORS)
        return cls(
            impl, SEQUENTIAL if impl == LOCAL else GROUPED
        )  # from core 0.17 on, local layers have no grouped GEMM

    def name_of(self, names: Sequence[str]) -> str:
        """The model's name of a dense tensor among those that a family's table has: that of local
        layers is the first, and that of Transformer Engine's the last."""
        return names[0 if self.impl == LOCAL else -1]

    def own_name(self, name: str) -> str:
        """The model's name of what keys of format torch_dist call by the names of Transformer
        Engine's layers and of experts apart, in every model."""
        for theirs, ours in _LOCAL_NAMES if self.impl == LOCAL else ():
            name = name.replace(theirs, ours)
        return _EXPERTS_APART.sub(_grouped, name) if self.experts == GROUPED else name

    def extra_states(self, names: Iterable[str]) -> dict[str, None]:
        """The extra states, all of them empty, without which Transformer Engine's layers (2 and
        later) are not loaded strictly, by the names of a model's tensors. Megatron-LM's own layers
        do without."""
        if self.impl == LOCAL:
            return {}
        modules = dict.fromkeys(match[1] for match in map(_OF_ENGINE.match, names) if match)
        attentions = [
            module.replace(_PROJECTION, _ATTENTION)
            for module in modules
            if module.endswith(_PROJECTION)
        ]
        return dict.fromkeys(f"{module}.{extra_states.KEY}" for module in (*modules, *attentions))


def _grouped(match: re.Match[str]) -> str:
    expert, linear, kind = match.groups()
    return f".{linear}.{kind}" if kind == extra_states.KEY else f".{linear}.{kind}{expert}"


def check_recorded(source: Checkpoint, given: str | None) -> None:
    """Refuse a user's word (--transformer-impl) that contradicts the arguments."""
    recorded = _args(source).get("transformer_impl")
    if given is not None and given != recorded:
        raise RefusedError(
            f"{source.folder}: was trained with --transformer-impl {recorded or '(not recorded)'} "
            f"and not {given}; leave the flag out"
        )


def check_specification(source: Checkpoint, given: str | None) -> None:
    """Refuse that, and experts apart under arguments by which Megatron-LM builds two tensors of
    them."""
    check_recorded(source, given)
    names = (
        spec.name for trees in source.structures.values() for spec in leaves(trees, TensorSpec)
    )
    if Specification.of(_args(source)).experts == TWO_TENSORS and any(
        map(_EXPERTS_APART.search, names)
    ):
        raise RefusedError(
            f"{source.folder}: by its arguments ({_LEGACY_GROUPED}) all experts of a layer are two "
            "tensors, which cannot be made of experts apart yet; convert --to megatron-dist"
        )


def _args(source: Checkpoint) -> dict[str, Any]:
    return args_of(source.common_metadata)
