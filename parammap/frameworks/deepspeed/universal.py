"""Universal checkpoints: a folder for each parameter, whole, with a file for each of its states.

`zero/<name>/{fp32,exp_avg,exp_avg_sq}.pt` hold {"param": tensor, …}, `step.pt` the steps taken;
`zero/optimizer_state.pt` is what the optimizer keeps beside its states. Names are the optimizer's
own (see layers).

Sources: deepspeed 0.19.8 (checkpoint/ds_to_universal.py and universal_checkpoint.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parammap.errors import RefusedError
from parammap.formats import torch_zip
from parammap.frameworks.deepspeed.files import STATE_FILE, ZERO
from parammap.frameworks.deepspeed.layers import Functions, is_pipeline
from parammap.tensors.arrangement import Sizes
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, MAIN_PARAM, Stored
from parammap.tensors.names import shorten_names

#: the files of a parameter's states
FILES = {MAIN_PARAM: "fp32.pt", EXP_AVG: "exp_avg.pt", EXP_AVG_SQ: "exp_avg_sq.pt"}
STEP_FILE = "step.pt"
#: the state of Megatron-LM's scheduler and, in BigScience's older one (megatron/learning_rates.py,
#: AnnealingLR), the same
SCHEDULER = {
    "max_lr": "max_lr",
    "min_lr": "min_lr",
    "num_steps": "num_steps",
    "lr_warmup_steps": "warmup_steps",
    "lr_decay_steps": "decay_steps",
    "lr_decay_style": "decay_style",
}
#: the key of a file's tensor, and where the tied modules' parameters are
PARAM, _TIED = "param", "tied_modules."
#: stands for the embedding among the layer functions, all of which have greater numbers
_FIRST = 0


@dataclass(frozen=True, slots=True)
class UniversalParameter:
    """A parameter as the optimizer names it, whole: its canonical name, how it is put together, its
    shape."""

    name: str
    canonical: str
    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UniversalContents:
    """What a universal checkpoint is made of: the parameters, the steps of those that were stepped,
    the optimizer's state beside them, and the mp_rank files by name. `aliases` are further names of
    parameters."""

    parameters: list[UniversalParameter]
    sizes: Sizes
    steps: dict[str, Any]
    state: dict[str, Any]
    models: dict[str, dict[str, Any]]
    aliases: dict[str, str]


def check_complete(folder: Path, tensors: dict[str, dict[str, Stored]], stepped: set[str]) -> None:
    """Refuse where a parameter that some rank steps has no folder, or, if others have them, no
    moments."""
    if missing := sorted(stepped - tensors[MAIN_PARAM].keys()):
        raise RefusedError(
            f"{folder / ZERO / missing[0]}: missing, and {len(missing) - 1} others that the "
            f"mp_rank files name ({shorten_names(missing)}); copy the whole checkpoint"
        )
    if tensors[EXP_AVG] and (missing := sorted(stepped - tensors[EXP_AVG].keys())):
        raise RefusedError(
            f"{folder / ZERO / missing[0] / FILES[EXP_AVG]}: missing, as are the moments of "
            f"{len(missing) - 1} others ({shorten_names(missing)}); copy the whole checkpoint, or "
            "convert --weights-only"
        )


def read(
    folder: Path, num_layers: int | None
) -> tuple[dict[str, dict[str, Stored]], Functions | None]:
    """The tensors by state and the optimizer's name, and, of a pipeline, its functions."""
    tensors: dict[str, dict[str, Stored]] = {state: {} for state in FILES}
    for name in _parameters(folder):
        there = {
            state: path
            for state, file in FILES.items()
            if (path := folder / ZERO / name / file).is_file()
        }
        if MAIN_PARAM not in there or len(there) == 2:
            missing = next(file for state, file in FILES.items() if state not in there)
            raise RefusedError(
                f"{folder / ZERO / name / missing}: missing; copy the whole checkpoint"
            )
        for state, path in there.items():
            content = torch_zip.read(path)
            stored = content.get(PARAM) if isinstance(content, dict) else None
            if not isinstance(stored, Stored):
                raise RefusedError(f"{path}: holds no {PARAM}; is it of a universal checkpoint?")
            tensors[state][name] = stored
    if not tensors[MAIN_PARAM]:
        raise RefusedError(f"{folder / ZERO}: holds no parameters; copy the whole checkpoint")
    return tensors, _functions(folder, tensors[MAIN_PARAM], num_layers)


def rest(folder: Path) -> dict[str, Any]:
    """What the optimizer keeps beside its states, with its `param_groups`."""
    path = folder / ZERO / STATE_FILE
    content = torch_zip.read(path)
    if not isinstance(content, dict) or "param_groups" not in content:
        raise RefusedError(f"{path}: holds no param_groups; is it of a universal checkpoint?")
    return content


def steps(folder: Path) -> dict[str, Any]:
    """The steps taken by each parameter that says so, by the optimizer's name."""
    return {
        name: torch_zip.read(path)
        for name in _parameters(folder)
        if (path := folder / ZERO / name / STEP_FILE).is_file()
    }


def _parameters(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder / ZERO) if (folder / ZERO / name).is_dir())


def _functions(
    folder: Path, parameters: dict[str, Stored], num_layers: int | None
) -> Functions | None:
    if not is_pipeline(parameters):
        return None
    by_function: dict[int, set[str]] = {}
    for name in parameters:
        number, _, local = (
            f"{_FIRST}.{name.removeprefix(_TIED).partition('.')[2]}"
            if name.startswith(_TIED)
            else name
        ).partition(".")
        by_function.setdefault(int(number), set()).add(local)
    return Functions.of(folder, by_function, num_layers)
