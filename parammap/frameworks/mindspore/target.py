"""MindSpore checkpoints as MindSpeed-Core-MS (r0.1.0) reads them:
`rank_N/<prefix>.ckpt|.safetensors` and `pt_meta/`.

N counts ranks in the order tp-cp-ep-dp-pp. A file holds one rank's tensors under global layer
numbers, float32 states as `name`, `exp_avg.name`, `exp_avg_sq.name`, and the scheduler's scalars
with the exact types its loader assigns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parammap import families
from parammap.checkpoint import completeness, extra_states
from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.checkpoint.index import StoredTensor
from parammap.errors import RefusedError
from parammap.formats import torch_zip
from parammap.formats.frames import Literal
from parammap.frameworks.megatron.specification import check_recorded
from parammap.frameworks.megatron.structure import leaves
from parammap.frameworks.mindspore.formats import FORMATS
from parammap.frameworks.mindspore.scalars import Scalars, scalars_of
from parammap.plan.plan import Output, Wanted, WantedFile, file_of_objects
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, MAIN_PARAM, Stored, TensorSpec
from parammap.tensors.names import shorten_names

NAMES = ("mindspore", "megatron")
#: the renames of MindSpeed-Core-MS's own convert_pt2ckpt.py, for the list of names on which the two
#: differ
_THEIR_NAMES = {
    "dense_h_to_4h": "mapping",
    "dense_4h_to_h": "projection",
    "self_attention": "attention",
    "query_key_value": "qkv_proj",
    "dense": "out_proj",
}


@dataclass(frozen=True, slots=True)
class Options:
    """How to write: file format, whose names, the states to keep, the dtype that weights are cast
    to (None: as they are).

    `dp` and `cp` only number the rank folders; None: the source's. `transformer_impl`: as of
    Megatron-LM's own files."""

    format: str = "ckpt"
    names: str = "mindspore"
    file_prefix: str = "network"
    states: tuple[str, ...] = (MAIN_PARAM, EXP_AVG, EXP_AVG_SQ)
    dtype: str | None = None
    dp: int | None = None
    cp: int | None = None
    generate_all_dp_cp: bool = False
    transformer_impl: str | None = None


def output(source: Checkpoint, options: Options) -> Output:
    """Plan the files of a MindSpore checkpoint in the source's layout. Raises RefusedError for
    names it has no place for."""
    check_recorded(source, options.transformer_impl)
    _check_names(source, options)
    _check_states(source, options)
    numbered = replace(
        source.layout, dp=options.dp or source.layout.dp, cp=options.cp or source.layout.cp
    )
    if numbered.dp % numbered.ep:
        raise RefusedError(
            f"{source.folder}: dp {numbered.dp} is no multiple of its expert parallel size "
            f"{numbered.ep}"
        )
    namer = _Namer(source, options)
    states = _states_by_rank(source)
    files: list[WantedFile] = []
    converted: list[tuple[Path, str]] = []
    links: list[tuple[str, str]] = []
    left_out: dict[str, str] = {}
    for rank, folder in source.rank_folders.items():
        scalars = scalars_of(source.training_states[rank], source.iteration)
        left_out |= scalars.left_out
        files.append(_rank_file(source, numbered, rank, options, namer, states, scalars))
        converted.append((folder, files[-1].path))
        links += _links(numbered, rank, options)
    files += list(_meta_files(source))
    return Output(
        files,
        converted,
        links,
        {"scalars_left_out": left_out, "names_unlike_mindspeed_converter": namer.unlike},
        states=options.states if source.with_optimizer else (MAIN_PARAM,),
        extra_states=tuple(map(str, extra_states.filled(source.structures))),
    )


def _check_names(source: Checkpoint, options: Options) -> None:
    if options.names == "mindspore":
        if missing := completeness.missing(source, whole_layers=True):
            raise RefusedError(
                f"{source.folder}: no complete GPT-like model: {shorten_names(missing)} missing; "
                "with --names megatron it is converted as it is"
            )
        unknown = sorted(
            {
                held.found.name
                for held in source.index.held
                if held.row is None or not families.names_of(held.row.canonical, families.MINDSPORE)
            }
        )
        if unknown:
            raise RefusedError(
                f"{source.folder}: MindSpeed-Core-MS's model has no place for {len(unknown)} "
                f"tensors: {shorten_names(unknown)}; use --names megatron"
            )


def _check_states(source: Checkpoint, options: Options) -> None:
    unknown = set(options.states) - source.index.states()
    if unknown and source.with_optimizer:
        raise RefusedError(
            f"{source.folder}: holds no optimizer state called {', '.join(sorted(unknown))}, only "
            f"{', '.join(sorted(source.index.states()))}"
        )


class _Namer:
    """Output names, under global layer numbers; `unlike` has those that MindSpeed's own converter
    writes otherwise."""

    def __init__(self, source: Checkpoint, options: Options) -> None:
        self.options = options
        #: norms have a name as LayerNorm's, the first, and one as RMSNorm's (MindSpeed-Core-MS,
        #: mindspeed_ms/legacy/model/norm.py)
        has_layer_norm = any(held.canonical == "final_norm.bias" for held in source.index.held)
        self.which = 0 if has_layer_norm else -1
        self.unlike: dict[str, str] = {}

    def name(self, held: StoredTensor) -> str:
        layer, expert = held.layer, families.expert_of(held.found.name)
        if self.options.names == "megatron":
            return families.renumber(held.found.name, layer, None)
        assert held.row is not None, held.found.name  # _check_names
        names = families.names_of(held.row.canonical, families.MINDSPORE)
        name = names[self.which].format(i=layer, e=expert)
        parts = families.renumber(held.found.name, layer, None).split(".")
        theirs = ".".join(_THEIR_NAMES.get(part, part) for part in parts)
        if theirs != name:
            self.unlike[name] = theirs
        return name


def _rank_file(
    source: Checkpoint,
    numbered: Layout,
    rank: Coordinates,
    options: Options,
    namer: _Namer,
    states: _States,
    scalars: Scalars,
) -> WantedFile:
    tensors = [
        Wanted(
            TensorSpec(
                prefix + namer.name(held),
                options.dtype or held.found.stored.dtype,
                held.found.stored.shape,
            ),
            held.parts,
        )
        for held, prefix in _states_at(rank, options, states)
    ]
    tensors += [Wanted(spec) for spec in scalars.specs]
    _check_unique(source.rank_folders[rank], tensors)
    path = f"rank_{_number(numbered, rank)}/{options.file_prefix}.{options.format}"
    return WantedFile(
        path,
        tuple(FORMATS[options.format].frame([w.spec for w in tensors])),
        tuple(tensors),
        Place(*rank),
    )


#: by (tp, pp, ep): canonical name: state: the tensor
_States = dict[Coordinates, dict[str, dict[str, StoredTensor]]]


def _states_by_rank(source: Checkpoint) -> _States:
    states: _States = {}
    for held in source.index.held:
        at = held.found.place
        states.setdefault((at.tp, at.pp, at.ep), {}).setdefault(held.canonical, {})[
            held.found.state
        ] = held
    return states


def _states_at(
    rank: Coordinates, options: Options, states: _States
) -> Iterator[tuple[StoredTensor, str]]:
    """The states of this rank's parameters with their name prefix, in buffer order, parameter by
    parameter.

    With expert parallel, only the first expert rank's optimizer holds the dense parameters, which
    the others share."""
    tp, pp, _ = rank
    for canonical, by_state in states[rank].items():
        if MAIN_PARAM not in by_state:
            by_state = states[tp, pp, 0][canonical]
        for state in options.states:
            if state in by_state:
                yield by_state[state], "" if state == MAIN_PARAM else f"{state}."


def _check_unique(folder: Path, tensors: list[Wanted]) -> None:
    seen: set[str] = set()
    for wanted in tensors:
        if wanted.spec.name in seen:
            raise RefusedError(f"{folder}: two tensors would be called {wanted.spec.name}")
        seen.add(wanted.spec.name)


def _number(numbered: Layout, rank: Coordinates, dp: int | None = None, cp: int = 0) -> int:
    """The lowest global rank that holds the place, or the one at (dp, cp); the expert rank is the
    fast part of dp."""
    tp, pp, ep = rank
    return numbered.global_rank(tp, pp, ep if dp is None else dp, cp)


def _links(numbered: Layout, rank: Coordinates, options: Options) -> Iterator[tuple[str, str]]:
    if not options.generate_all_dp_cp:
        return
    file = f"{options.file_prefix}.{options.format}"
    first = _number(numbered, rank)
    for dp in range(rank[2], numbered.dp, numbered.ep):
        for cp in range(numbered.cp):
            number = _number(numbered, rank, dp, cp)
            if number != first:
                yield f"rank_{number}/{file}", f"rank_{first}/{file}"


def _meta_files(source: Checkpoint) -> Iterator[WantedFile]:
    """`pt_meta/`: the sidecar's files, and per rank what the way back needs of
    model_optim_rng.pt."""
    for name, content in source.sidecar.contents() if source.sidecar else ():
        yield WantedFile(f"pt_meta/{name}", (Literal(content),), ())
    for (tp, pp, ep), meta in source.rank_metadata.items():
        suffix = f"_ep{ep:03}" if source.layout.ep > 1 else ""
        path = f"pt_meta/args_tp{tp:02}_pp{pp:03}{suffix}.pt"
        frame = torch_zip.frame(_meta(source, (tp, pp, ep), meta), Path(path).name)
        yield file_of_objects(path, frame, {})


_META_KEYS = (
    "args",
    "checkpoint_version",
    "iteration",
    "optimizer",
    "opt_param_scheduler",
    "rng_state",
    "num_floating_point_operations_so_far",
)
#: ours, beside what the existing tool keeps: the model's state dicts with ("tensor", dtype, shape)
#: for each tensor
STRUCTURE_KEY = "parammap_model_structure"


def _meta(source: Checkpoint, rank: Coordinates, meta: dict[str, Any]) -> dict[str, Any]:
    """All of a model file but the model, with the keys that MindSpeed-Core-MS's convert_pt2ckpt.py
    (r0.1.0) always has, and the model's structure. The state of an optimizer that is not
    distributed is no metadata and is left out."""
    kept = {**meta, **{key: None for key in _META_KEYS if key not in meta}}
    if any(
        stored.numel > 1 for stored in leaves(kept["optimizer"], Stored)
    ):  # a loss scale is one number
        kept["optimizer"] = None
    kept[STRUCTURE_KEY] = [_described(tree) for tree in source.structures[rank]]
    if not source.with_optimizer:
        chunks = source.structures[rank]
        key = "model" if len(chunks) == 1 else "model{}"
        kept["param_name_list"] = [
            [f"{key.format(number)}.{spec.name}" for spec in reversed([*leaves(tree, TensorSpec)])]
            for number, tree in enumerate(chunks)
        ]
    return kept


def _described(tree: object) -> object:
    """The tree with ("tensor", dtype, shape) for each tensor."""
    if isinstance(tree, TensorSpec):
        return ("tensor", tree.dtype, tree.shape)
    return (
        {key: _described(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
    )
