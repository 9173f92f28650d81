"""Reading DeepSpeed checkpoints: Megatron-DeepSpeed's pipelines (GPT, BLOOM), models without one,
universal checkpoints.

What an optimizer steps is its fp32 partitions; the layer files, or the module in the mp_rank files,
are copies of them in the dtype that the model computes in, and the weights themselves of what no
optimizer steps. See files, zero and layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from parammap import families
from parammap.checkpoint import owners
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.cuts import UNRECORDED, Partition
from parammap.checkpoint.index import Index, NameResolver, TensorEntry
from parammap.errors import RefusedError
from parammap.families import DEEPSPEED, LEGACY
from parammap.formats import torch_zip
from parammap.frameworks.deepspeed import universal, zero
from parammap.frameworks.deepspeed.files import DeepSpeedFiles, find, recognizes
from parammap.frameworks.deepspeed.layers import HEAD, WORDS, Functions, stages_of
from parammap.frameworks.deepspeed.training_state import iteration_of, shapes_of, training_state
from parammap.frameworks.framework import EVERYTHING, ReadOptions
from parammap.frameworks.megatron.facts import args_of, is_gated
from parammap.frameworks.megatron.optimizer import dropped as is_dropped
from parammap.tensors.arrangement import Sizes
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, MAIN_PARAM, MODEL_PARAM, Stored
from parammap.tensors.names import shorten_names

__all__ = ["read", "recognizes"]

#: a name of nobody's table is whole rows if there is one rank
_WHOLE = Partition(dim=0)


@dataclass(slots=True)
class DeepSpeedRank:
    """A rank of the model: its mp_rank file and what that holds, its model's tensors by our names
    (of a pipeline's, those of its stage) with all their copies, and its optimizer's states, the
    tensors by our names and the steps by its own."""

    path: Path
    place: Place
    content: dict[str, Any]
    functions: Functions | None = None
    model: dict[str, list[Stored]] = field(default_factory=dict)
    states: zero.States = field(default_factory=zero.States)

    def named(self, tensors: dict[str, Stored]) -> Iterator[tuple[str, Stored]]:
        """An optimizer's tensors by our names, without the copies that nothing keeps in step."""
        for name, stored in tensors.items():
            own = (
                self.functions.of_optimizer(self.path, name, self.place.pp)
                if self.functions
                else name
            )
            if own is not None:
                yield own, stored

    def take(self, states: zero.States) -> None:
        """The optimizer's states, by its own names."""
        self.states = replace(
            states, tensors={state: dict(self.named(own)) for state, own in states.tensors.items()}
        )

    def shapes(self) -> list[dict[str, Any]]:
        """The shapes of the parameters that are stepped, by group."""
        return shapes_of(self.content)

    def meta(self) -> dict[str, Any]:
        """What the rank keeps beside the model, and of its optimizer `zero` and `steps`."""
        rest = {
            key: value for key, value in self.content.items() if key not in ("module", "optimizer")
        }
        if self.functions:
            rest["functions"] = self.functions.prefixes
        if not self.states.tensors:
            return rest
        return {**rest, "zero": self.states.rest, "steps": self.states.steps}


def read(source: Path, options: ReadOptions = EVERYTHING) -> Checkpoint:
    """Read a checkpoint's headers and metadata. SRC is a save root or the folder of one step.

    `rank_metadata` holds per rank the mp_rank file without the model, and of its optimizer `zero`
    (see zero.States.rest) and `steps` by parameter. Raises RefusedError for anything missing,
    damaged, contradictory, or of ZeRO stage 3."""
    if options.sidecar_folder is not None:
        raise RefusedError(
            f"{options.sidecar_folder}: DeepSpeed's checkpoints say themselves what lies where and have no "
            f"sidecar; leave --sidecar out"
        )
    files = find(source, options.iteration)
    contents = {m: _content(path) for m, path in sorted(files.models.items())}
    if files.is_universal:
        ranks, layout, naming = _universal(files, contents, options.weights_only)
    else:
        ranks, layout, naming = _ranks(files, contents, options.weights_only)
    found = [one for rank in ranks for one in _found(rank, naming)]
    kept = [one for one in found if not is_dropped(one.name, options.drop)]
    index = Index([naming.hold(one) for one in kept], layout)
    index.check_complete()
    left = _left_out(ranks, naming)
    notes = [
        f"{len(left)} copies that later stages keep and nothing keeps in step are left out "
        f"({shorten_names(left)})"
    ]
    return Checkpoint(
        "deepspeed",
        files.folder,
        iteration_of(ranks[0].content),
        layout,
        index,
        len(index.states()) > 1,
        index.num_layers(),
        rank_folders={(rank.place.tp, rank.place.pp, 0): files.folder for rank in ranks},
        rank_metadata={(rank.place.tp, rank.place.pp, 0): rank.meta() for rank in ranks},
        training_states={
            (rank.place.tp, rank.place.pp, 0): training_state(rank.content, rank.states)
            for rank in ranks
        },
        notes=notes if left else [],
        dropped=sorted({*left, *(one.name for one in found)} - {one.name for one in kept}),
    )


def _content(path: Path) -> dict[str, Any]:
    content = torch_zip.read(path)
    if not isinstance(content, dict) or "module" not in content:
        raise RefusedError(f"{path}: holds no model states of DeepSpeed")
    return content


def _universal(
    files: DeepSpeedFiles, contents: dict[int, dict[str, Any]], weights_only: bool
) -> tuple[list[DeepSpeedRank], Layout, NameResolver]:
    first = contents[min(contents)]
    tensors, functions = universal.read(files.folder, args_of(first).get("num_layers"))
    universal.check_complete(
        files.folder,
        tensors,
        {name for content in contents.values() for group in shapes_of(content) for name in group},
    )
    states = (
        zero.States()
        if weights_only or not tensors[EXP_AVG]
        else zero.States(
            {state: tensors[state] for state in (EXP_AVG, EXP_AVG_SQ)},
            universal.steps(files.folder),
            universal.rest(files.folder),
        )
    )
    rank = DeepSpeedRank(files.models[min(contents)], Place(), first, functions)
    aliases = first.get("shared_params") or {}
    for name, stored in rank.named(tensors[MAIN_PARAM]):
        rank.model.setdefault(aliases.get(name, name), []).append(stored)
    rank.take(states)
    return [rank], Layout(), _naming([rank], Layout(), functions is not None)


def _ranks(
    files: DeepSpeedFiles, contents: dict[int, dict[str, Any]], weights_only: bool
) -> tuple[list[DeepSpeedRank], Layout, NameResolver]:
    """The ranks of the model, with their tensors under our names."""
    layout = _layout(files, contents)
    places = {m: Place(m % layout.tp, m // layout.tp) for m in contents}
    owned = ((files.models[m], args_of(content), places[m]) for m, content in contents.items())
    owners.check_ranks(files.folder, layout, owned)
    if files.layers:
        functions, layers = _layers(files, contents)
        ranks = [
            DeepSpeedRank(files.models[m], places[m], content, functions)
            for m, content in contents.items()
        ]
        _share_out(ranks, functions, layers)
    else:
        ranks = [
            DeepSpeedRank(
                files.models[m], Place(m), content, None, _module(files.models[m], content)
            )
            for m, content in contents.items()
        ]
    if not weights_only:
        _add_states(files, ranks, layout)
    return ranks, layout, _naming(ranks, layout, bool(files.layers))


def _layout(files: DeepSpeedFiles, contents: dict[int, dict[str, Any]]) -> Layout:
    """tp and pp as the files count them, checked against what they say; dp as they say, or as there
    are shards."""
    tp = files.tp()
    pp = len(files.models) // tp
    for m, content in contents.items():
        said = content.get("checkpoint_parallel_dimensions") or {"tp_degree": tp, "pp_degree": pp}
        if (said["tp_degree"], said["pp_degree"]) != (tp, pp):
            raise RefusedError(
                f"{files.models[m]}: was saved with tp {said['tp_degree']} and pp "
                f"{said['pp_degree']}, and "
                f"its files are of tp {tp} and pp {pp}; copy the whole checkpoint"
            )
    dp = 1 + max(
        (dp for _, dp in files.shards), default=(contents[0].get("dp_world_size") or 1) - 1
    )
    return Layout(tp=tp, pp=pp, etp=tp, dp=dp)


# -------------------------------------------------------------------------------------------------------------
# the model

_Layers = dict[tuple[int, int], dict[str, Stored]]


def _layers(
    files: DeepSpeedFiles, contents: dict[int, dict[str, Any]]
) -> tuple[Functions, _Layers]:
    layers = {key: _tensors(path, torch_zip.read(path)) for key, path in files.layers.items()}
    functions = Functions.of(
        files.folder,
        {number: own for (number, tp), own in layers.items() if tp == 0},
        args_of(contents[0]).get("num_layers"),
    )
    for (number, tp), own in layers.items():
        if own.keys() != layers[number, 0].keys():
            raise RefusedError(
                f"{files.layers[number, tp]}: has other parameters than "
                f"{files.layers[number, 0].name}: "
                f"{shorten_names(own.keys() ^ layers[number, 0].keys())}; these files are of "
                f"different runs"
            )
    return functions, layers


def _share_out(ranks: list[DeepSpeedRank], functions: Functions, layers: _Layers) -> None:
    """Give each rank the layers of its stage."""
    stages = stages_of(functions, [rank.shapes() for rank in ranks if rank.place.tp == 0])
    by_place = {rank.place: rank for rank in ranks}
    for (number, tp), own in layers.items():
        model = by_place[Place(tp, stages[number])].model
        model |= {functions.name(number, local): [stored] for local, stored in own.items()}


def _module(path: Path, content: dict[str, Any]) -> dict[str, list[Stored]]:
    """The module's tensors; a parameter that is another's alias stands beside it."""
    if content["module"] is None:
        raise RefusedError(
            f"{path}: holds no module, as a pipeline's do, and there are no layer files; copy the "
            f"whole checkpoint"
        )
    aliases = content.get("shared_params") or {}
    model: dict[str, list[Stored]] = {}
    for name, stored in _tensors(path, content["module"]).items():
        model.setdefault(aliases.get(name, name), []).append(stored)
    return model


def _tensors(path: Path, state_dict: Any) -> dict[str, Stored]:
    """The tensors of a flat state dict. Raises RefusedError for anything else in it."""
    if not isinstance(state_dict, dict) or not state_dict:
        raise RefusedError(f"{path}: holds no parameters")
    if strange := sorted(
        str(name) for name, value in state_dict.items() if not isinstance(value, Stored)
    ):
        raise RefusedError(f"{path}: its model holds what is no tensor: {shorten_names(strange)}")
    return dict(state_dict)


# ---------------------------------------------------------------------------------------------------------
# the optimizer


def _add_states(files: DeepSpeedFiles, ranks: list[DeepSpeedRank], layout: Layout) -> None:
    if not files.shards:
        if saved := next(
            (rank for rank in ranks if rank.content.get("optimizer") or rank.shapes()), None
        ):
            kept = (
                "is not ZeRO's"
                if saved.content.get("optimizer")
                else "has no *_optim_states.pt here"
            )
            raise RefusedError(
                f"{saved.path}: its optimizer {kept}; copy the whole checkpoint, or convert "
                f"--weights-only"
            )
        return
    for m, rank in enumerate(ranks):
        rank.take(
            zero.read(rank.path, rank.content, [files.shards[m, dp] for dp in range(layout.dp)])
        )
        if unknown := sorted(rank.states.tensors[MAIN_PARAM].keys() - rank.model.keys() - {HEAD}):
            raise RefusedError(
                f"{rank.path}: its optimizer steps {shorten_names(unknown)}, which the model does "
                f"not have; these files are of different runs"
            )


def _left_out(ranks: list[DeepSpeedRank], naming: NameResolver) -> list[str]:
    """The copies of later stages that are not read."""
    return sorted(
        {
            name
            for rank in ranks
            if naming.dialect == DEEPSPEED and rank.place.pp and rank.states.tensors
            for group in rank.shapes()
            for name in group
            if name.startswith("tied_modules.") and not name.endswith(WORDS)
        }
    )


def _found(rank: DeepSpeedRank, naming: NameResolver) -> Iterator[TensorEntry]:
    states = rank.states.tensors
    stepped = states.get(MAIN_PARAM, {}).keys()
    for state, own in states.items():
        for name, stored in own.items():
            yield TensorEntry(name, rank.place, state, stored, _partition(name, naming))
    for name, copies in rank.model.items():
        for stored in copies:
            yield TensorEntry(
                name,
                rank.place,
                MODEL_PARAM if name in stepped else MAIN_PARAM,
                stored,
                _partition(name, naming),
            )


def _partition(name: str, naming: NameResolver) -> Partition:
    """A tensor that no family knows is whole where there is one tensor-parallel rank."""
    return (
        _WHOLE
        if naming.layout.tp == 1 and families.find(name, naming.dialect) is None
        else UNRECORDED
    )


# --------------------------------------------------------------------------------------------------------------
# the names


def _naming(ranks: list[DeepSpeedRank], layout: Layout, is_pipeline: bool) -> NameResolver:
    first = ranks[0].content
    names = [name for rank in ranks for name in rank.model]
    dialect = DEEPSPEED if is_pipeline else LEGACY
    known = [name for name in names if families.find(name, dialect)]
    if known:
        _check_version(ranks[0].path, first)
    heads = args_of(first).get("num_attention_heads")
    shapes = [{name: copies[0].shape for name, copies in rank.model.items()} for rank in ranks]
    return NameResolver(
        dialect,
        layout,
        None,
        None,
        Sizes(heads, heads, _vocab(first) if known else None),
        is_gated(shapes, dialect),
        tied=True if is_pipeline else None,
    )


def _check_version(path: Path, content: dict[str, Any]) -> None:
    """Rows of query_key_value are [head, q + k + v, head size] from checkpoint version 2 on
    (megatron/checkpointing.py, fix_query_key_value_ordering)."""
    version = content.get("checkpoint_version", 0)
    if version < 2:
        raise RefusedError(
            f"{path}: is of checkpoint version {version}, whose rows of query_key_value are in "
            f"another order "
            "than from version 2 on; load it with Megatron-DeepSpeed and save it again"
        )


def _vocab(content: dict[str, Any]) -> int | None:
    """The true vocabulary's size, where it is recorded (megatron/checkpointing.py,
    _checkpoint_info)."""
    infos = (content.get("checkpoint_info"), content.get("universal_checkpoint_info"))
    return next(
        (info["original_vocab_size"] for info in infos if info and info.get("original_vocab_size")),
        None,
    )
