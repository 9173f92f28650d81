"""What a checkpoint is, as plain data: the one source of the text, the JSON and the HTML of
`parammap inspect`.

Everything comes from headers and sidecars; no tensor data is read.
"""

from __future__ import annotations

from typing import Any

from parammap.checkpoint import completeness
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.frameworks import registry
from parammap.frameworks.framework import Recorded
from parammap.inspection import model, ranks, training_state
from parammap.inspection.buffers import RELEASES, Optimizers
from parammap.inspection.reading import Reading, asked
from parammap.inspection.tensors import tensor_tree
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, MAIN_PARAM, MODEL_PARAM
from parammap.tensors.names import shorten_names

SCHEMA, VERSION = "parammap.inspection", 1

_STATE_ORDER = (MAIN_PARAM, EXP_AVG, EXP_AVG_SQ, MODEL_PARAM)


def inspect(reading: Reading, *, tensors: bool = False) -> dict[str, Any]:
    """The facts of a checkpoint as JSON knows them; element counts and offsets in elements, sizes
    in bytes."""
    checkpoint, whole = reading.best, reading.whole
    framework = registry.framework(checkpoint.framework)
    layout = checkpoint.sidecar.any_layout() if checkpoint.sidecar else None
    recorded = framework.inspection.recorded(checkpoint)
    files = ranks.files_of(whole)
    optimizers = Optimizers.of(checkpoint)
    result = {
        "schema": SCHEMA,
        "version": VERSION,
        "framework": checkpoint.framework,
        "folder": str(checkpoint.folder),
        "iteration": checkpoint.iteration,
        "release": _release(layout),
        "layout": _layout(checkpoint),
        "stages": ranks.stages(checkpoint, whole),
        "ranks": ranks.ranks(whole, files),
        "model": model.model(recorded, whole),
        "parameters": model.parameters(recorded, framework.tied(checkpoint), whole),
        "states": _states(reading),
        "progress": training_state.progress(checkpoint.training_state),
        "optimizer": _optimizer(reading, optimizers),
        "buffers": optimizers.buffers(),
        "flat_parameters": framework.inspection.flat_parameters(checkpoint, files),
        "files": ranks.files_by_kind(checkpoint, files),
        "sidecar": ranks.sidecar(checkpoint, files),
        "missing": _missing(reading, recorded, with_layout=layout is not None),
    }
    if tensors:
        result["tensors"] = tensor_tree(whole)
    return result


def _release(layout: dict[str, Any] | None) -> dict[str, Any] | None:
    framework = layout and layout.get("framework")
    return framework and {
        "core": framework.get("core_version"),
        "torch": framework.get("torch_version"),
    }


def _layout(checkpoint: Checkpoint) -> dict[str, Any]:
    layout = checkpoint.layout
    return {
        name: getattr(layout, name)
        for name in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp", "order")
    }


def _states(reading: Reading) -> list[dict[str, Any]]:
    """Each state and dtype: tensors and logical elements, and bytes on disk with the copies that
    several ranks keep."""
    counted: dict[tuple[str, str], dict[str, int]] = {}
    for checkpoint, states in _read_states(reading):
        for tensor in checkpoint.index.shards:
            if tensor.state in states:
                entry = counted.setdefault(
                    (states[tensor.state], tensor.dtype), {"tensors": 0, "elements": 0, "bytes": 0}
                )
                entry["tensors"] += 1
                entry["elements"] += model.numel(tensor)
        for held in checkpoint.index.held:
            if held.found.state in states:
                counted[states[held.found.state], held.found.stored.dtype]["bytes"] += (
                    held.found.stored.nbytes
                )
    order = {state: number for number, state in enumerate(_STATE_ORDER)}
    return [
        {"role": state, "dtype": dtype, **entry}
        for (state, dtype), entry in sorted(
            counted.items(), key=lambda item: (order.get(item[0][0], 9), item[0])
        )
    ]


def _read_states(reading: Reading) -> list[tuple[Checkpoint, dict[str, str]]]:
    """The checkpoints to count, with the states to take from each and what they are: without an
    optimizer, the weights that Megatron-LM's model computes with stand in for those that an
    optimizer steps."""
    states = {state: state for state in reading.best.index.states() | {MODEL_PARAM}}
    alone = reading.weights, {MAIN_PARAM: asked(reading.weights).weights_state}
    if reading.states is None:
        return [alone]
    if reading.reason is None:
        return [(reading.states, states)]
    return [(reading.states, {state: state for state in states if state != MODEL_PARAM}), alone]


def _optimizer(reading: Reading, optimizers: Optimizers) -> dict[str, Any]:
    checkpoint = reading.best
    generation = optimizers.generation()
    return {
        "readable": reading.states is not None and reading.reason is None,
        "reason": reading.reason,
        "generation": generation,
        "written_by": RELEASES.get(generation) if generation else None,
        "states": sorted(reading.states.index.states() - {MAIN_PARAM}) if reading.states else [],
        **training_state.optimizer(checkpoint.training_state),
    }


def _missing(reading: Reading, recorded: Recorded, with_layout: bool) -> list[str]:
    """What one would want and is not there, one line each; damage is refused before."""
    checkpoint, lines = reading.best, []
    if reading.reason:
        lines.append(
            f"the optimizer's states{' of the experts' if reading.states else ''} cannot be read: "
            f"{reading.reason}"
        )
    elif reading.states is None:
        lines.append("there are no optimizer states: these are weights only")
    if checkpoint.sidecar and not checkpoint.sidecar.complete:
        lines.append(
            "the sidecar is bare maps: no release, and no bucket bounds but those of the "
            "checkpoint itself"
        )
    if not asked(checkpoint).keeps_args:
        known = model.architecture(checkpoint)
        if known is None or known.heads is None:
            lines.append("the number of attention heads is not recorded")
    elif not recorded.with_args:
        lines.append(
            "the run's arguments are not saved"
            + ("" if with_layout else ": dp, cp and heads are not known")
        )
    if lacking := completeness.missing(reading.whole, whole_layers=True):
        lines.append(f"tensors of a GPT-like model: {shorten_names(lacking)}")
    return lines
