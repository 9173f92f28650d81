"""Which layer of the model each layer function of a Megatron-DeepSpeed pipeline is, and what its
parameters are called.

GPTModelPipe's functions are numbered through: one that casts, the embedding, one that transposes,
the transformer's layers, one that transposes back, the final norm, the head. A function's
parameters are saved under their names in it, an optimizer calls them `{I}.{name}`, those of the
embedding `tied_modules.embed.{name}` on the first stage and on the last, whose head it is; there
only the word embedding is kept in step with the first stage's.

Sources: bigscience-workshop/Megatron-DeepSpeed 8387ae1 (megatron/model/gpt_model.py, GPTModelPipe)
and deepspeed 0.19.8 (runtime/pipe/module.py, allreduce_tied_weight_gradients)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parammap import families
from parammap.errors import RefusedError
from parammap.families import DEEPSPEED
from parammap.tensors.names import shorten_names

EMBEDDING, NORM = "embedding", "final_norm"
#: the word embedding on the last stage, and what stands before the embedding's names
HEAD, WORDS, TIED = (
    "word_embeddings_for_head.weight",
    "word_embeddings.weight",
    "tied_modules.embed.",
)
_TIED = re.compile(r"tied_modules\.\w+\.(.+)")
_SPLIT = re.compile(r"(layers\.\d+|[^.]+)\.(.+)")
_NUMBERED = re.compile(r"(\d+)\.(.+)")


def is_pipeline(names: Iterable[str]) -> bool:
    """Whether these are a pipeline's names of parameters."""
    return any(_TIED.fullmatch(name) or _NUMBERED.fullmatch(name) for name in names)


@dataclass(frozen=True, slots=True)
class Functions:
    """The functions of a pipeline that have parameters: what stands before their names in our
    dialect, by number."""

    prefixes: dict[int, str]
    num_layers: int

    @classmethod
    def of(
        cls, folder: Path, names: Mapping[int, Iterable[str]], num_layers: int | None
    ) -> Functions:
        """From the names in each function. Raises RefusedError for a function of no GPT, and for a
        layer that is missing. `num_layers` is what the run says, None if it does not."""
        kinds = {number: _kind(folder, number, set(own)) for number, own in sorted(names.items())}
        layers = [number for number, kind in kinds.items() if kind == "layers"]
        order = [kind for number, kind in kinds.items() if kind != "layers" or number == layers[0]]
        if order != [EMBEDDING, "layers", NORM]:
            raise RefusedError(
                f"{folder}: its functions with parameters are {', '.join(order)}, and those of a "
                "GPT are an embedding, layers and a final norm; copy the whole checkpoint"
            )
        if layers[-1] - layers[0] + 1 != len(layers) or num_layers not in (None, len(layers)):
            raise RefusedError(
                f"{folder}: has the layer functions {shorten_names(map(str, layers))}, and the "
                f"model has "
                f"{num_layers or layers[-1] - layers[0] + 1} layers; copy the whole checkpoint"
            )
        prefixes = {
            number: f"layers.{number - layers[0]}" if kind == "layers" else kind
            for number, kind in kinds.items()
        }
        return cls(prefixes, len(layers))

    def name(self, number: int, local: str) -> str:
        """The name in our dialect of a function's parameter."""
        return f"{self.prefixes[number]}.{local}"

    def of_optimizer(self, where: Path, name: str, stage: int) -> str | None:
        """The name in our dialect of an optimizer's parameter; None for a later stage's copy that
        nothing keeps in step.

        Raises RefusedError for a name that is no pipeline's.
        """
        if match := _TIED.fullmatch(name):
            if stage == 0:
                return f"{EMBEDDING}.{match[1]}"
            return HEAD if match[1] == WORDS else None
        match = _NUMBERED.fullmatch(name)
        if match is None or int(match[1]) not in self.prefixes:
            raise RefusedError(
                f"{where}: names {name}, of which there is no layer file; copy the whole checkpoint"
            )
        return self.name(int(match[1]), match[2])


def optimizer_name(name: str, prefixes: Mapping[int, str]) -> str:
    """The optimizer's name of a parameter of our dialect."""
    ((prefix, local),) = _SPLIT.findall(name)
    if prefix == EMBEDDING:
        return f"{TIED}{local}"
    return f"{next(number for number, own in prefixes.items() if own == prefix)}.{local}"


def _kind(folder: Path, number: int, names: set[str]) -> str:
    if names <= {"weight", "bias"}:
        return NORM
    kind = "layers.0" if any(name.startswith("self_attention.") for name in names) else EMBEDDING
    if strange := sorted(
        name for name in names if families.find(f"{kind}.{name}", DEEPSPEED) is None
    ):
        raise RefusedError(
            f"{folder}: layer function {number} has parameters of no GPT of Megatron-DeepSpeed: "
            f"{shorten_names(strange)}"
        )
    return kind.partition(".")[0]


def stages_of(
    functions: Functions, shapes: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[int, int]:
    """The stage of each function, from the parameters whose shapes each stage's model file names
    (`shapes`, by stage); of one that nobody trains, that of the function before."""
    named = {
        int(match[1]): stage
        for stage, groups in enumerate(shapes)
        for group in groups
        for name in group
        if (match := _NUMBERED.fullmatch(name))
    }
    stages, stage = {}, 0
    for number, prefix in functions.prefixes.items():
        stage = 0 if prefix == EMBEDDING else named.get(number, stage)
        stages[number] = stage
    return stages
