"""What a config.json says of a model: its architecture, and the names and shapes of the tensors
that it has.

One table of settings serves both ways: a configuration read becomes an Architecture, and an
Architecture a configuration.

Source: transformers 4.57
(models/{gpt2,opt,llama,mistral,qwen2,qwen3,bloom}/{configuration,modeling}_*.py) and 5.0, whose
rope_parameters hold what rope_theta and rope_scaling do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from parammap import families
from parammap.checkpoint.architecture import (
    BLOOM,
    GPT2,
    LLAMA,
    OPT,
    ROWS_BEFORE_POSITIONS,
    Architecture,
)
from parammap.errors import RefusedError
from parammap.families import HEAD
from parammap.families.hugging_face import PREFIX

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
#: an Architecture's fields by the settings that say them; the first name is written, the others are
#: aliases of it
_HUGGING_FACE = {
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "vocab": ("vocab_size",),
    "positions": ("max_position_embeddings",),
    "tied": ("tie_word_embeddings",),
}
_SETTINGS = {
    GPT2: {
        "layers": ("n_layer", "num_hidden_layers"),
        "hidden": ("n_embd", "hidden_size"),
        "heads": ("n_head", "num_attention_heads"),
        "ffn": ("n_inner",),
        "vocab": ("vocab_size",),
        "positions": ("n_positions", "max_position_embeddings", "n_ctx"),
        "activation": ("activation_function",),
        "eps": ("layer_norm_epsilon",),
        "tied": ("tie_word_embeddings",),
    },
    OPT: {**_HUGGING_FACE, "ffn": ("ffn_dim",), "activation": ("activation_function",)},
    LLAMA: {
        **_HUGGING_FACE,
        "ffn": ("intermediate_size",),
        "groups": ("num_key_value_heads",),
        "head_size": ("head_dim",),
        "activation": ("hidden_act",),
        "eps": ("rms_norm_eps",),
        "rope_theta": ("rope_theta",),
        "rope_scaling": ("rope_scaling",),
    },
    BLOOM: {
        "layers": ("n_layer", "num_hidden_layers"),
        "hidden": ("hidden_size", "n_embed"),
        "heads": ("n_head", "num_attention_heads"),
        "vocab": ("vocab_size",),
        "eps": ("layer_norm_epsilon",),
        "tied": ("tie_word_embeddings",),
    },
}
#: what no setting says, as it is the same in every model of a family
CONSTANT = {GPT2: {}, OPT: {"eps": 1e-5}, LLAMA: {}, BLOOM: {"activation": "gelu_new"}}
#: fields that a configuration may leave out, for what follows of the others
_DERIVED = ("ffn", "groups", "head_size", "rope_scaling", "activation", "eps")

#: whether a model has the tensors of such canonical names, by its settings; those that nothing is
#: said of, it has
Presence = Mapping[str, Callable[[Mapping[str, Any]], bool]]
_NO_BIAS, _NO_QK_NORM = {r"\.bias$": lambda _: False}, {r"\.[qk]_norm\.": lambda _: False}
_ATTENTION_BIAS = {r"\.attention\.\w+\.bias$": lambda said: said["attention_bias"]}


def _is_projected(said: Mapping[str, Any]) -> bool:
    return said.get("word_embed_proj_dim", said["hidden_size"]) != said["hidden_size"]


@dataclass(frozen=True, slots=True)
class ModelType:
    """A model_type: its family, the classes of the whole model and of the one without a head, the
    settings' values where config.json is silent, and which tensors it has."""

    family: str
    causal: str
    base: str
    defaults: Mapping[str, Any]
    presence: Presence = field(default_factory=dict)


_ROTARY = {
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
}
MODEL_TYPES = {
    "gpt2": ModelType(
        GPT2,
        "GPT2LMHeadModel",
        "GPT2Model",
        {
            "tie_word_embeddings": True,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
        },
    ),
    "opt": ModelType(
        OPT,
        "OPTForCausalLM",
        "OPTModel",
        {
            "tie_word_embeddings": True,
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "enable_bias": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
        },
        {
            r"project_(in|out)\.": _is_projected,
            r"^final_norm\.": lambda said: (
                said["do_layer_norm_before"] and not said["_remove_final_layer_norm"]
            ),
            r"norm\.": lambda said: said["layer_norm_elementwise_affine"],
            r"\.(attention|mlp)\.\w+\.bias$": lambda said: said["enable_bias"],
        },
    ),
    "llama": ModelType(
        LLAMA,
        "LlamaForCausalLM",
        "LlamaModel",
        _ROTARY,
        {**_NO_QK_NORM, **_ATTENTION_BIAS, r"\.mlp\.\w+\.bias$": lambda said: said["mlp_bias"]},
    ),
    "mistral": ModelType(
        LLAMA,
        "MistralForCausalLM",
        "MistralModel",
        {**_ROTARY, "num_key_value_heads": 8, "sliding_window": 4096},
        {**_NO_QK_NORM, **_NO_BIAS},
    ),
    "qwen2": ModelType(
        LLAMA,
        "Qwen2ForCausalLM",
        "Qwen2Model",
        _ROTARY,
        {**_NO_QK_NORM, r"\.(out|gate|up|fc2)\.bias$": lambda _: False},
    ),
    "qwen3": ModelType(
        LLAMA,
        "Qwen3ForCausalLM",
        "Qwen3Model",
        {**_ROTARY, "head_dim": 128},
        {**_ATTENTION_BIAS, r"\.mlp\.\w+\.bias$": lambda _: False},
    ),
    "bloom": ModelType(
        BLOOM,
        "BloomForCausalLM",
        "BloomModel",
        {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5},
    ),
}
#: by model_type, settings that make a model compute otherwise than its family does, where they
#: differ from these
_AS_FAMILY = {
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "opt": {
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "bloom": {"apply_residual_connection_post_layernorm": False},
}

#: the sizes [out, in] of a tensor by its canonical name without layer and ending; norms and biases
#: have the first one only
_SHAPES = {
    "embedding.word": ("vocab", "words"),
    "embedding.position": ("positions", "hidden"),
    "output": ("vocab", "words"),
    "embedding.project_in": ("hidden", "words"),
    "project_out": ("words", "hidden"),
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
class Model:
    """A model that a configuration describes; `where` names that configuration in errors."""

    where: str
    config: Mapping[str, Any]

    @cached_property
    def type_name(self) -> str:
        """Its model_type, by its class where it does not say. Raises RefusedError for one that is
        not among MODEL_TYPES, and for a class with another head."""
        classes = self.config.get("architectures") or []
        of_class = [
            name for name, kind in MODEL_TYPES.items() if {kind.causal, kind.base} & set(classes)
        ]
        name = self.config.get("model_type") or next(iter(of_class), None)
        if name not in MODEL_TYPES:
            raise RefusedError(
                f"{self.where}: is a {name or ', '.join(classes) or 'model without a model_type'}, "
                f"and only "
                f"{', '.join(MODEL_TYPES)} can be converted"
            )
        if classes and name not in of_class:
            kind = MODEL_TYPES[name]
            raise RefusedError(
                f"{self.where}: is a {', '.join(classes)}, and of {name} only {kind.causal} and "
                f"{kind.base} "
                "can be converted"
            )
        return name

    @property
    def type(self) -> ModelType:
        return MODEL_TYPES[self.type_name]

    @property
    def family(self) -> str:
        return self.type.family

    @property
    def is_base(self) -> bool:
        """Whether it is the base model, which has no head, tied or not."""
        return self.type.base in (self.config.get("architectures") or [])

    @cached_property
    def said(self) -> dict[str, Any]:
        """Its settings, by the names that are written, with those that config.json is silent of."""
        given = {name: value for name, value in self.config.items() if value is not None}
        for names in _SETTINGS[self.family].values():
            given |= (
                dict.fromkeys(names[:1], first)
                if (first := _first(names, given)) is not None
                else {}
            )
        return {**self.type.defaults, **given, **_rope(given)}

    @cached_property
    def architecture(self) -> Architecture:
        """Raises RefusedError for a setting that is missing, and for one that fits no other."""
        settings = {name: names[0] for name, names in _SETTINGS[self.family].items()}
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
            **{**derived, **CONSTANT[self.family], **known},
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
            for name, usual in _AS_FAMILY.get(self.type_name, {}).items()
            if settings.get(name, usual) != usual
        ]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The sizes that shapes are made of."""
        model = self.architecture
        queries, keys = model.heads * model.head_size, model.groups * model.head_size
        return {
            "vocab": model.vocab,
            "hidden": model.hidden,
            "ffn": model.ffn,
            "head": model.head_size,
            "words": self.said.get("word_embed_proj_dim", model.hidden)
            if self.family == OPT
            else model.hidden,
            "positions": (model.positions or 0) + ROWS_BEFORE_POSITIONS.get(self.family, 0),
            "queries": queries,
            "keys": keys,
            "qkv": queries + 2 * keys,
        }

    @property
    def prefix(self) -> str:
        """What stands before the names of a whole model's tensors, the head's excepted."""
        return "" if self.is_base else PREFIX[self.family]

    def tensors(self) -> Iterator[Expected]:
        """All that it has, of the library's parameters; a tied head is none."""
        for canonical, (name, row) in families.rows_of(self.family).items():
            has_head = not (self.is_base or self.architecture.tied)
            if not self._has(canonical) or (canonical == HEAD and not has_head):
                continue
            shape = self._shape(canonical)
            for i in range(self.architecture.layers) if "{i}" in canonical else (None,):
                yield Expected(
                    canonical.format(i=i),
                    name.format(i=i),
                    shape,
                    shape[::-1] if row.transposed else shape,
                )

    def _has(self, canonical: str) -> bool:
        return all(
            rule(self.said)
            for pattern, rule in self.type.presence.items()
            if re.search(pattern, canonical)
        )

    def _shape(self, canonical: str) -> tuple[int, ...]:
        stem, _, ending = canonical.removeprefix("layers.{i}.").rpartition(".")
        names = _SHAPES[stem]
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


def read(folder: Path) -> Model:
    """A folder's config.json. Raises RefusedError if it is missing, damaged, or of what cannot be
    converted: an adapter, or a quantised model."""
    if (folder / ADAPTER).is_file():
        raise RefusedError(
            f"{folder / ADAPTER}: is of an adapter (LoRA), which is a part of a model only; merge "
            f"it into "
            "its base model and save that"
        )
    return load(folder / CONFIG)


def load(path: Path) -> Model:
    """A config.json. Raises RefusedError as `read` does."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path}: cannot be read ({error}); copy the whole folder") from error
    if not isinstance(config, dict):
        raise RefusedError(f"{path}: is no configuration of a model; copy it again")
    if config.get("quantization_config"):
        raise RefusedError(
            f"{path}: is of a quantised model (quantization_config), whose tensors are no weights; "
            f"convert "
            "the model that it was made of"
        )
    return Model(str(path), config)


def completed(known: Architecture, given: Model) -> Architecture:
    """The architecture as a given configuration says it, to be written as it is. Raises
    RefusedError where it contradicts what is known."""
    told = given.architecture
    if told.family != known.family:
        raise RefusedError(
            f"{given.where}: is of the {told.family} family, and the model of {known.family}'s; "
            f"name another"
        )
    names = sorted({*_SETTINGS[known.family], *CONSTANT[known.family]} - {"vocab"})
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
) -> Model:
    """The configuration of a model that has none: of `names`, its weights' canonical names, and
    with `words` columns in its word embedding. What nobody recorded is null where the library knows
    it so, and refused where it is needed.

    Raises RefusedError for what is not recorded, and for what the family's models compute
    otherwise."""
    name = _type_of(architecture.family, names)
    fields = {field: getattr(architecture, field) for field in _SETTINGS[architecture.family]}
    tied = HEAD not in names and architecture.tied is not False
    fields |= {"tied": tied, "groups": architecture.groups or architecture.heads}
    if missing := sorted(
        field
        for field, value in fields.items()
        if value is None and field != "rope_scaling" and field in _SETTINGS[architecture.family]
    ):
        flag = "--activation, or " if missing == ["activation"] else ""
        raise RefusedError(
            f"{where}: does not record its {', '.join(missing)}; tell with {flag}a config.json of "
            f"the model: "
            "--config FILE"
        )
    for constant, value in CONSTANT[architecture.family].items():
        if (there := getattr(architecture, constant)) not in (None, value):
            raise RefusedError(
                f"{where}: has {constant} {there}, and transformers' {name} has {value} only; the "
                f"two models "
                "compute differently"
            )
    kind = MODEL_TYPES[name]
    config = {
        setting[0]: fields[field] for field, setting in _SETTINGS[architecture.family].items()
    }
    config |= {
        "architectures": [kind.causal if tied or HEAD in names else kind.base],
        "model_type": name,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **_told_by_tensors(name, names, words),
    }
    return Model(where, dict(sorted(config.items())))


def _type_of(family: str, names: set[str]) -> str:
    """The model_type of a model, LLaMA-like ones by their biases and norms."""
    if family != LLAMA:
        return family
    if "layers.0.attention.q_norm.weight" in names:
        return "qwen3"
    biased = {part for part in ("q", "out") if f"layers.0.attention.{part}.bias" in names}
    return "qwen2" if biased == {"q"} else "llama"


def _told_by_tensors(model_type: str, names: set[str], words: int) -> dict[str, Any]:
    """The settings that the tensors themselves tell."""
    attention, mlp = (f"layers.0.{name}.bias" in names for name in ("attention.out", "mlp.fc2"))
    return {
        "opt": {"word_embed_proj_dim": words, "do_layer_norm_before": True, "enable_bias": mlp},
        "llama": {"attention_bias": attention, "mlp_bias": mlp},
        "qwen3": {"attention_bias": attention},
    }.get(model_type, {})
