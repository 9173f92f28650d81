"""What a config.json says of a model: its architecture, and the names and shapes of the tensors
that it has.

A family's one table of settings serves both ways: a configuration read becomes an Architecture, and
an Architecture a configuration.

Source: transformers 4.57 and 5.0, whose rope_parameters hold what rope_theta and rope_scaling
do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from parammap.errors import RefusedError
from parammap.families import FAMILIES, HEAD, Architecture, Config, ModelType, tensors_of
from parammap.formats import json_document

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
#: fields that a configuration may leave out, for what follows of the others
_DERIVED = ("ffn", "groups", "head_size", "rope_scaling", "activation", "eps")

#: the sizes [out, in] of a tensor by its canonical name without layer and ending; norms and biases
#: have the first one only
_SHAPES = {
    "embedding.word": ("vocab", "words"),
    "embedding.position": ("positions", "hidden"),
    "output": ("vocab", "words"),
    "attention.qkv": ("qkv", "hidden"),
    "attention.q": ("queries", "hidden"),
    "attention.k": ("keys", "hidden"),
    "attention.v": ("keys", "hidden"),
    "attention.out": ("hidden", "queries"),
    "attention.q_norm": ("head",),
    "attention.k_norm": ("head",),
    "mlp.fc1": ("ffn", "hidden"),
    "mlp.gate": ("ffn", "hidden"),
    "mlp.up": ("ffn", "hidden"),
    "mlp.fc2": ("hidden", "ffn"),
    "embedding.norm": ("hidden",),
    "input_norm": ("hidden",),
    "post_attention_norm": ("hidden",),
    "final_norm": ("hidden",),
}


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor that a model has: its canonical name, its name without the base model's prefix, its
    shape as [out, in], and the shape on disk."""

    canonical: str
    name: str
    shape: tuple[int, ...]
    lying: tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    """A model that a configuration describes; `where` names that configuration in errors."""

    where: str
    config: Mapping[str, Any]

    @cached_property
    def type_name(self) -> str:
        """Its model_type, by its class where it does not say. Raises RefusedError for one that no
        family has, and for a class with another head."""
        classes = self.config.get("architectures") or []
        types = {name: kind for one in _configs() for name, kind in one.types.items()}
        of_class = [name for name, kind in types.items() if {kind.causal, kind.base} & set(classes)]
        name = self.config.get("model_type") or next(iter(of_class), None)
        if name not in types:
            raise RefusedError(
                f"{self.where}: is a {name or ', '.join(classes) or 'model without a model_type'}, "
                f"and only "
                f"{', '.join(types)} can be converted"
            )
        if classes and name not in of_class:
            kind = types[name]
            raise RefusedError(
                f"{self.where}: is a {', '.join(classes)}, and of {name} only {kind.causal} and "
                f"{kind.base} "
                "can be converted"
            )
        return str(name)

    @property
    def type(self) -> ModelType:
        return self.terms.types[self.type_name]

    @cached_property
    def family(self) -> str:
        return next(
            name
            for name, one in FAMILIES.items()
            if one.config and self.type_name in one.config.types
        )

    @property
    def terms(self) -> Config:
        """What configurations say of models of its family."""
        return config_of(self.family)

    @property
    def is_base(self) -> bool:
        """Whether it is the base model, which has no head, tied or not."""
        return self.type.base in (self.config.get("architectures") or [])

    @cached_property
    def said(self) -> dict[str, Any]:
        """Its settings, by the names that are written, with those that config.json is silent of."""
        given = {name: value for name, value in self.config.items() if value is not None}
        for names in self.terms.settings.values():
            given |= (
                dict.fromkeys(names[:1], first)
                if (first := _first(names, given)) is not None
                else {}
            )
        return {**self.type.defaults, **given, **_rope(given)}

    @cached_property
    def architecture(self) -> Architecture:
        """Raises RefusedError for a setting that is missing, and for one that fits no other."""
        settings = {name: names[0] for name, names in self.terms.settings.items()}
        missing = [
            setting
            for name, setting in settings.items()
            if name not in _DERIVED and setting not in self.said
        ]
        if missing:
            raise RefusedError(
                f"{self.where}: does not say {', '.join(missing)}; write them into it"
            )
        known = {
            name: self.said[setting] for name, setting in settings.items() if setting in self.said
        }
        hidden, heads = known["hidden"], known["heads"]
        groups = known.get("groups", heads)
        if "head_size" not in known and hidden % heads or heads % groups:
            raise RefusedError(
                f"{self.where}: {heads} heads in {groups} groups do not fit a hidden size of "
                f"{hidden}; one "
                "of them is wrong"
            )
        derived = {"groups": groups, "head_size": hidden // heads, "ffn": 4 * hidden}
        return Architecture(
            family=self.family,
            **{**derived, **self.terms.constant, **known},
            bias=self._has("layers.0.mlp.fc2.bias"),
            config=dict(self.config),
            unlike=tuple(self.unlike),
        )

    @property
    def unlike(self) -> list[str]:
        """The settings by which it computes otherwise than its family's models do in other
        frameworks."""
        settings = {**self.type.defaults, **self.config}
        return [
            f"{name} {settings[name]}"
            for name, usual in self.type.as_family.items()
            if settings.get(name, usual) != usual
        ]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The sizes that shapes are made of."""
        model: dict[str, Any] = asdict(self.architecture)
        queries, keys = (model[of] * model["head_size"] for of in ("heads", "groups"))
        own = {
            size: self.said[setting]
            for size, setting in self.terms.sizes.items()
            if setting in self.said
        }
        return {
            "vocab": model["vocab"],
            "hidden": model["hidden"],
            "ffn": model["ffn"],
            "gate_up": 2 * model["ffn"],
            "head": model["head_size"],
            "words": model["hidden"],
            "positions": (model["positions"] or 0) + self.architecture.rows_before_positions,
            "queries": queries,
            "keys": keys,
            "qkv": queries + 2 * keys,
            **own,
        }

    @property
    def prefix(self) -> str:
        """What stands before the names of a whole model's tensors, the head's excepted."""
        return "" if self.is_base else self.terms.prefix

    def tensors(self) -> Iterator[Expected]:
        """All that it has, of the library's parameters; a tied head is none."""
        has_head = not (self.is_base or self.architecture.tied)
        layers, experts = self.architecture.layers, self.sizes.get("experts", 0)
        for canonical, name, row in tensors_of(self.family, layers, experts):
            if self._has(row.canonical) and (canonical != HEAD or has_head):
                shape = self._shape(row.canonical)
                yield Expected(canonical, name, shape, shape[::-1] if row.transposed else shape)

    def _has(self, canonical: str) -> bool:
        return all(
            rule(self.said)
            for pattern, rule in self.type.presence.items()
            if re.search(pattern, canonical)
        )

    def _shape(self, canonical: str) -> tuple[int, ...]:
        stem, _, ending = canonical.removeprefix("layers.{i}.").rpartition(".")
        names = {**_SHAPES, **self.terms.shapes}[stem]
        return tuple(self.sizes[name] for name in (names[:1] if ending == "bias" else names))


def _first(names: tuple[str, ...], settings: Mapping[str, Any]) -> Any:
    return next((settings[name] for name in names if name in settings), None)


def _rope(given: dict[str, Any]) -> dict[str, Any]:
    """Base and scaling of rotary positions, by the names of release 4; the default is no
    scaling."""
    told = {**(given.get("rope_parameters") or {})}
    base = {"rope_theta": told.pop("rope_theta")} if "rope_theta" in told else {}
    scaling = told or given.get("rope_scaling") or {}
    plain = scaling.get("rope_type", scaling.get("type", "default")) == "default"
    return {**base, "rope_scaling": None if plain else scaling}


def _configs() -> list[Config]:
    return [one.config for one in FAMILIES.values() if one.config]


def config_of(family: str) -> Config:
    """What configurations say of a family. Raises ValueError for one that transformers lacks."""
    if (config := FAMILIES[family].config) is None:
        raise ValueError(f"{family}: has no config.json")
    return config


def read(folder: Path) -> ModelConfig:
    """A folder's config.json. Raises RefusedError if it is missing, damaged, or of what cannot be
    converted: an adapter, or a quantised model."""
    if (folder / ADAPTER).is_file():
        raise RefusedError(
            f"{folder / ADAPTER}: is of an adapter (LoRA), which is a part of a model only; merge "
            f"it into "
            "its base model and save that"
        )
    return load(folder / CONFIG)


def load(path: Path) -> ModelConfig:
    """A config.json. Raises RefusedError as `read` does."""
    config = json_document.read(path, json_document.check_of("config"), "copy the whole folder")
    if config.get("quantization_config"):
        raise RefusedError(
            f"{path}: is of a quantised model (quantization_config), whose tensors are no weights; "
            f"convert "
            "the model that it was made of"
        )
    return ModelConfig(str(path), config)


def completed(known: Architecture, given: ModelConfig) -> Architecture:
    """The architecture as a given configuration says it, to be written as it is. Raises
    RefusedError where it contradicts what is known."""
    told = given.architecture
    if told.family != known.family:
        raise RefusedError(
            f"{given.where}: is of the {told.family} family, and the model of {known.family}'s; "
            f"name another"
        )
    names = sorted({*given.terms.settings, *given.terms.constant} - {"vocab"})
    fields = {name: (getattr(known, name), getattr(told, name)) for name in names}
    wrong = [
        f"{name} {its}, and the model {has}"
        for name, (has, its) in fields.items()
        if has not in (None, its)
    ]
    if wrong:
        raise RefusedError(
            f"{given.where}: has {'; '.join(wrong)}: it is of another model; name another"
        )
    return replace(told, vocab=known.vocab)


def written(
    architecture: Architecture, names: set[str], words: int, dtype: str, where: str
) -> ModelConfig:
    """The configuration of a model that has none: of `names`, its weights' canonical names, and
    with `words` columns in its word embedding. What nobody recorded is null where the library knows
    it so, and refused where it is needed.

    Raises RefusedError for what is not recorded, and for what the family's models compute
    otherwise."""
    terms = config_of(architecture.family)
    name, kind = _type_of(terms, names)
    fields = {field: getattr(architecture, field) for field in terms.settings}
    tied = HEAD not in names and architecture.tied is not False
    fields |= {"tied": tied, "groups": architecture.groups or architecture.heads}
    if missing := sorted(
        field
        for field, value in fields.items()
        if value is None and field != "rope_scaling" and field in terms.settings
    ):
        flag = "--activation, or " if missing == ["activation"] else ""
        raise RefusedError(
            f"{where}: does not record its {', '.join(missing)}; tell with {flag}a config.json of "
            f"the model: "
            "--config FILE"
        )
    for constant, value in terms.constant.items():
        if (there := getattr(architecture, constant)) not in (None, value):
            raise RefusedError(
                f"{where}: has {constant} {there}, and transformers' {name} has {value} only; the "
                f"two models "
                "compute differently"
            )
    config = {setting[0]: fields[field] for field, setting in terms.settings.items()}
    config |= {
        "architectures": [kind.causal if tied or HEAD in names else kind.base],
        "model_type": name,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **({terms.sizes["words"]: words} if "words" in terms.sizes else {}),
        **kind.fixed,
        **{setting: tensor in names for setting, tensor in kind.from_tensors.items()},
    }
    return ModelConfig(where, dict(sorted(config.items())))


def _type_of(terms: Config, names: set[str]) -> tuple[str, ModelType]:
    """The model_type that a model of these tensors is written as."""
    *_, last = (
        (name, kind)
        for name, kind in terms.types.items()
        if kind.written_where is not None
        and all((tensor in names) == has for tensor, has in kind.written_where.items())
    )
    return last
