"""What a checkpoint is, as plain data: the one source of the text, the JSON and the HTML of
`parammap inspect`.

Everything comes from headers and sidecars; no tensor data is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parammap.checkpoint import completeness
from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.checkpoint.index import is_padding
from parammap.errors import RefusedError
from parammap.families import HEAD, WORD_EMBEDDING, Architecture
from parammap.frameworks import registry
from parammap.frameworks.architecture import architecture_of
from parammap.frameworks.framework import Inspection
from parammap.frameworks.megatron.facts import Facts
from parammap.inspection import training_state
from parammap.inspection.buffers import RELEASES, Optimizers
from parammap.inspection.kinds import KINDS, kind_of
from parammap.name_list import shorten_names
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, MAIN_PARAM, MODEL_PARAM, LogicalTensor

SCHEMA, VERSION = "parammap.inspection", 1

MODEL_FACTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "padded_vocab_size",
    "max_position_embeddings",
    "position_embedding_type",
    "normalization",
    "swiglu",
    "add_bias_linear",
    "num_experts",
    "untie_embeddings_and_output_weights",
)
#: the same facts by the names of an architecture, for checkpoints without Megatron-LM's arguments
_ARCHITECTURE_FACTS = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "heads": "num_attention_heads",
    "head_size": "kv_channels",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
    "activation": "activation",
}
_STATE_ORDER = (MAIN_PARAM, EXP_AVG, EXP_AVG_SQ, MODEL_PARAM)


@dataclass(frozen=True, slots=True)
class Reading:
    """What could be read: the model's weights, and the optimizer's states whole, without experts,
    or not at all (None).

    `reason` says why the states are not whole.
    """

    weights: Checkpoint
    states: Checkpoint | None
    reason: str | None = None

    @property
    def best(self) -> Checkpoint:
        return self.states or self.weights

    @property
    def whole(self) -> Checkpoint:
        """The one whose index names every tensor."""
        return self.weights if self.reason else self.best


def read(
    source: Path,
    *,
    iteration: int | None = None,
    sidecar: Path | None = None,
    metadata_from: Path | None = None,
) -> Reading:
    """Read as much as the sidecar allows. Raises RefusedError for what the reader refuses in the
    weights, in the optimizer's files, or between them and a sidecar that should suffice."""
    try:
        checkpoint = registry.read(
            source, iteration=iteration, sidecar=sidecar, metadata_from=metadata_from
        )
        return Reading(checkpoint, checkpoint if checkpoint.with_optimizer else None)
    except RefusedError as error:
        unreadable = registry.recognized(source).inspection.unreadable
        if sidecar or metadata_from or unreadable is None:
            raise
        weights = registry.read(source, iteration=iteration, weights_only=True)
        reason, drop = unreadable(weights, error)
        states = _without(drop, source, iteration) if drop else None
        return Reading(weights, states, reason)


def _without(drop: frozenset[str], source: Path, iteration: int | None) -> Checkpoint | None:
    try:
        return registry.read(source, iteration=iteration, drop=drop)
    except RefusedError:
        return None


def _asked(checkpoint: Checkpoint) -> Inspection:
    return registry.framework(checkpoint.framework).inspection


def inspect(reading: Reading, *, tensors: bool = False) -> dict[str, Any]:
    """The facts of a checkpoint as JSON knows them; element counts and offsets in elements, sizes
    in bytes."""
    checkpoint, whole = reading.best, reading.whole
    facts = Facts.of_checkpoint(checkpoint)
    files = _files_of_ranks(whole)
    optimizers = Optimizers.of(checkpoint)
    flat_parameters = _asked(checkpoint).flat_parameters
    result = {
        "schema": SCHEMA,
        "version": VERSION,
        "framework": checkpoint.framework,
        "folder": str(checkpoint.folder),
        "iteration": checkpoint.iteration,
        "release": _release(facts.recorded),
        "layout": _layout(checkpoint),
        "stages": _stages(checkpoint, whole),
        "ranks": _ranks(whole, files),
        "model": _model(facts, whole),
        "parameters": _parameters(whole, facts),
        "states": _states(reading),
        "progress": training_state.progress(checkpoint.training_state),
        "optimizer": _optimizer(reading, optimizers),
        "buffers": optimizers.buffers(),
        "flat_parameters": flat_parameters(checkpoint, files) if flat_parameters else [],
        "files": _files(checkpoint, files),
        "sidecar": _sidecar(checkpoint, files),
        "missing": _missing(reading, facts),
    }
    if tensors:
        result["tensors"] = _tensors(whole)
    return result


def _release(recorded: dict[str, Any] | None) -> dict[str, Any] | None:
    framework = recorded and recorded.get("framework")
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


def _stages(checkpoint: Checkpoint, whole: Checkpoint) -> list[dict[str, Any]]:
    """Each pipeline stage's chunks with their global layers; by the layout files where the tensors
    do not tell chunks.

    The embedding is in a stage's first chunk, an output layer in its last one.
    """
    layers: dict[tuple[int, int], set[int]] = {(pp, 0): set() for pp in range(checkpoint.layout.pp)}
    ends: dict[str, set[int]] = {WORD_EMBEDDING: set(), HEAD: set()}
    for held in whole.index.held:
        place = held.found.place
        if held.layer is not None:
            layers.setdefault((place.pp, place.vpp), set()).add(held.layer)
        if held.row is not None and held.row.canonical in ends:
            ends[held.row.canonical].add(place.pp)
    if not _asked(checkpoint).as_trained:
        layers = _recorded_layers(checkpoint) or layers
    stages = []
    for pp in range(checkpoint.layout.pp):
        vpps = sorted(vpp for stage, vpp in layers if stage == pp)
        stages.append(
            {
                "pp": pp,
                "chunks": [
                    {
                        "vpp": vpp,
                        "layers": sorted(layers[pp, vpp]),
                        "embedding": vpp == vpps[0] and pp in ends[WORD_EMBEDDING],
                        "output": vpp == vpps[-1] and pp in ends[HEAD],
                    }
                    for vpp in vpps
                ],
            }
        )
    return stages


def _recorded_layers(checkpoint: Checkpoint) -> dict[tuple[int, int], set[int]]:
    ranks = checkpoint.sidecar.ranks if checkpoint.sidecar else {}
    return {
        (pp, chunk["vpp"]): {number for numbers in chunk["layers"].values() for number in numbers}
        for (_, pp, _), rank in ranks.items()
        if rank.layout
        for chunk in rank.layout["chunks"]
    }


def _files_of_ranks(whole: Checkpoint) -> dict[Coordinates, list[Path]]:
    """Each rank's files: all in its folder; where ranks share folders, those that hold its
    tensors."""
    if _asked(whole).file_kinds is not None:
        return {
            rank: [path for path in sorted(folder.iterdir()) if path.is_file()]
            for rank, folder in whole.rank_folders.items()
        }
    files: dict[Coordinates, set[str]] = {rank: set() for rank in whole.rank_folders}
    for held in whole.index.held:
        place = held.found.place
        files[place.tp, place.pp, place.ep] |= {extent.file for extent in held.found.stored.extents}
    return {rank: sorted(map(Path, names)) for rank, names in files.items()}


def _ranks(whole: Checkpoint, files: dict[Coordinates, list[Path]]) -> list[dict[str, Any]]:
    """Each (tp, pp, ep): its folder, the bytes of its files, and the elements of the model it
    holds, by kind."""
    elements: dict[Coordinates, dict[str, int]] = {
        rank: dict.fromkeys(KINDS, 0) for rank in whole.rank_folders
    }
    counted = set()
    for held in whole.index.held:
        one = held.found
        if one.state in (MAIN_PARAM, MODEL_PARAM) and (one.place, one.name) not in counted:
            counted.add((one.place, one.name))
            elements[one.place.tp, one.place.pp, one.place.ep][kind_of(held.canonical)] += (
                one.stored.numel
            )
    return [
        {
            "tp": tp,
            "pp": pp,
            "ep": ep,
            "folder": folder.name,
            "bytes": sum(path.stat().st_size for path in files[tp, pp, ep]),
            "elements": {kind: count for kind, count in elements[tp, pp, ep].items() if count},
        }
        for (tp, pp, ep), folder in sorted(
            whole.rank_folders.items(), key=lambda item: (item[0][1], item[0])
        )
    ]


def _model(facts: Facts, whole: Checkpoint) -> dict[str, Any]:
    """What the run recorded of the model; layers, width and vocabulary by the tensors themselves
    where it did not."""
    architecture = _architecture(whole)
    known = _of_architecture(architecture) if architecture else _recorded_model(facts, whole)
    return {
        name: value for name, value in known.items() if isinstance(value, (bool, int, float, str))
    }


def _recorded_model(facts: Facts, whole: Checkpoint) -> dict[str, Any]:
    recorded = (facts.recorded or {}).get("model") or facts.args
    sizes = facts.sizes()
    embedding = next((t for t in whole.index.tensors(MAIN_PARAM) if t.name == WORD_EMBEDDING), None)
    by_tensors: dict[str, int | None] = {"num_layers": whole.num_layers}
    if embedding:
        padding = sum(
            t.rows
            for t in whole.index.tensors(MAIN_PARAM)
            if is_padding(t) and t.name.startswith(WORD_EMBEDDING)
        )
        by_tensors |= {"padded_vocab_size": embedding.rows + padding, "hidden_size": embedding.cols}
    if sizes.heads:
        by_tensors["num_query_groups"] = sizes.groups
    return {**{name: recorded.get(name) for name in MODEL_FACTS}, **by_tensors}


def _architecture(whole: Checkpoint) -> Architecture | None:
    """What the model of a framework that keeps no arguments of Megatron-LM's computes; None if that
    is not known."""
    try:
        return None if _asked(whole).keeps_args else architecture_of(whole)
    except RefusedError:
        return None


def _of_architecture(known: Architecture) -> dict[str, Any]:
    groups = known.groups if known.groups != known.heads else None
    return {
        **{name: getattr(known, own) for own, name in _ARCHITECTURE_FACTS.items()},
        "num_query_groups": groups,
        "untie_embeddings_and_output_weights": None if known.tied is None else not known.tied,
    }


def _parameters(whole: Checkpoint, facts: Facts) -> dict[str, Any]:
    """Logical parameters, each counted once however many ranks keep a copy. `total` is all;
    `vocab_padding` what of it is rows past the vocabulary, None where nobody recorded that;
    `tied_copy` the elements of an output layer that repeats the embedding, which are not in `total`
    (None where nobody recorded whether it does: then they are)."""
    weights = whole.index.tensors(MAIN_PARAM)
    by_kind = dict.fromkeys(KINDS, 0)
    for tensor in weights:
        by_kind[kind_of(tensor.name)] += _numel(tensor)
    total = sum(map(_numel, weights))
    knows_vocab = facts.sizes().vocab or _architecture(whole)
    padding = (
        sum(
            _numel(t)
            for t in weights
            if is_padding(t) and t.name.startswith((WORD_EMBEDDING, HEAD))
        )
        if knows_vocab
        else None
    )
    copied = {
        part.tensor
        for held in whole.index.held
        if held.is_tied_head
        for part in held.parts
        if part.tensor and part.tensor.state == MAIN_PARAM
    }
    tied = sum(map(_numel, copied))
    is_told = tied or facts.tied() is not None or HEAD not in {tensor.name for tensor in weights}
    return {
        "tensors": len(weights),
        "total": total,
        "by_kind": {kind: n for kind, n in by_kind.items() if n},
        "tied_copy": tied if is_told else None,
        "vocab_padding": padding,
        "without_padding": None if padding is None else total - padding,
    }


def _numel(tensor: LogicalTensor) -> int:
    return tensor.rows * tensor.cols


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
                entry["elements"] += _numel(tensor)
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
    alone = (
        reading.weights,
        {MAIN_PARAM: _asked(reading.weights).weights_state},
    )
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


def _files(checkpoint: Checkpoint, files: dict[Coordinates, list[Path]]) -> list[dict[str, Any]]:
    known = _asked(checkpoint).file_kinds
    kinds: dict[str, list[int]] = {}
    for path in sorted(set().union(*files.values())):
        kind = (
            "tensors"
            if known is None
            else known.get(path.name) or known.get(path.suffix) or "other"
        )
        kinds.setdefault(kind, []).append(path.stat().st_size)
    if checkpoint.sidecar:
        kinds["sidecar"] = [
            path.stat().st_size
            for path in sorted(checkpoint.sidecar.folder.iterdir())
            if path.is_file()
        ]
    return [
        {"kind": kind, "files": len(sizes), "bytes": sum(sizes)}
        for kind, sizes in sorted(kinds.items())
    ]


def _sidecar(checkpoint: Checkpoint, files: dict[Coordinates, list[Path]]) -> dict[str, Any] | None:
    if find := _asked(checkpoint).sidecar:
        return find(checkpoint, sorted(set().union(*files.values())))
    if (sidecar := checkpoint.sidecar) is None:
        return None
    return {
        "kind": "layout" if sidecar.complete else "maps",
        "folder": str(sidecar.folder),
        "files": len(sidecar.files),
        "ranks": len(sidecar.ranks),
        "iteration": sidecar.iteration,
    }


def _missing(reading: Reading, facts: Facts) -> list[str]:
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
    if not _asked(checkpoint).keeps_args:
        known = _architecture(checkpoint)
        if known is None or known.heads is None:
            lines.append("the number of attention heads is not recorded")
    elif not facts.args:
        lines.append(
            "the run's arguments are not saved"
            + ("" if facts.recorded else ": dp, cp and heads are not known")
        )
    if lacking := completeness.missing(reading.whole, whole_layers=True):
        lines.append(f"tensors of a GPT-like model: {shorten_names(lacking)}")
    return lines


def _tensors(whole: Checkpoint) -> list[dict[str, Any]]:
    """Each logical tensor: shape, dtype of each state, how it is split, and who holds it under which
    name."""
    entries: dict[str, dict[str, Any]] = {}
    for tensor, regions in whole.index.shards.items():
        entry = entries.setdefault(
            tensor.name,
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "roles": {},
                "kind": kind_of(tensor.name),
                "split": "",
                "held_by": [],
            },
        )
        entry["roles"][tensor.state] = tensor.dtype
        if tensor.state == MAIN_PARAM:
            rows = any(region.sizes[0] != tensor.rows for region in regions)
            cols = any(region.sizes[1] != tensor.cols for region in regions)
            entry["split"] = "rows" if rows else "columns" if cols else "whole"
    holders: dict[str, dict[tuple[str, int], set[tuple[int, int, int]]]] = {}
    for held in whole.index.held:
        place = held.found.place
        for tensor in (part.tensor for part in held.parts if part.tensor):
            names = holders.setdefault(tensor.name, {})
            names.setdefault((held.found.name, place.vpp), set()).add(
                (place.tp, place.pp, place.ep)
            )
    for name, found in holders.items():
        entries[name]["held_by"] = [
            {"name": key, "vpp": vpp, "ranks": sorted(map(list, places))}
            for (key, vpp), places in sorted(found.items())
        ]
        if (
            entries[name]["split"] != "whole"
            and len({p[0] for places in found.values() for p in places}) == 1
        ):
            entries[name]["split"] = "whole"
    return [entries[name] for name in sorted(entries, key=_natural)]


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts the embedding first and the head last, and layer 10 after layer 9."""
    first = {"embedding": 0, "layers": 1}.get(name.partition(".")[0], 2)
    return [
        (0, first),
        *((0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")),
    ]
