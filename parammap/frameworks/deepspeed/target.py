"""Writing universal checkpoints, from which DeepSpeed resumes in any layout
(--universal-checkpoint).

`global_step{N}_universal/zero/` has a folder for each parameter and `optimizer_state.pt` (see
universal); beside it lie the mp_rank files, of which a resumed run reads all but the model;
`latest_universal` names the folder. `cat_dim` is the dimension that ranks cut, none for what each
has whole; the rows of a `vocab_tensor` are those of the true vocabulary, which is padded on
loading; `param_n_sub_params` are the parts of which each is cut for itself.

Sources: deepspeed 0.19.8 (checkpoint/ds_to_universal.py, merge_tp_slices; universal_checkpoint.py,
load_hp_checkpoint_state; runtime/base_optimizer.py and engine.py, load_checkpoint)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import atom_name, atoms
from parammap.errors import RefusedError
from parammap.families import WORD_EMBEDDING
from parammap.formats import torch_zip
from parammap.formats.frames import Literal
from parammap.frameworks.deepspeed import import_model
from parammap.frameworks.deepspeed.files import LATEST_UNIVERSAL, STATE_FILE, ZERO, find
from parammap.frameworks.deepspeed.layers import HEAD, optimizer_name
from parammap.frameworks.deepspeed.universal import (
    FILES,
    PARAM,
    STEP_FILE,
    UniversalContents,
    UniversalParameter,
)
from parammap.frameworks.megatron.facts import args_of
from parammap.plan.plan import Output, Wanted, WantedFile, file_of_objects
from parammap.tensors.arrangement import (
    GATE_UP,
    PADDING,
    REPLICATED,
    SHARD_1,
    VOCAB,
    Part,
    Sizes,
    arranged,
    whole_shape,
)
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, MAIN_PARAM, LogicalTensor, TensorSpec
from parammap.tensors.names import shorten_names

_MOMENTS = (EXP_AVG, EXP_AVG_SQ)


def output(target: Checkpoint, _options: object = None) -> Output:
    """Plan the folder. Raises RefusedError for a source without optimizer, for a model that is
    neither GPT nor BLOOM unless it is DeepSpeed's own, and for a tensor of which nobody knows how
    it is cut."""
    if not target.with_optimizer:
        raise RefusedError(
            f"{target.folder}: has no optimizer's states, and by them alone DeepSpeed resumes from "
            "a universal checkpoint; for weights choose another target"
        )
    contents = _own(target) if target.framework == "deepspeed" else import_model.contents(target)
    folder = f"global_step{target.iteration}_universal"
    files = [
        *_states(folder, target, contents),
        _file(f"{folder}/{ZERO}/{STATE_FILE}", contents.state),
        *(_file(f"{folder}/{name}", content) for name, content in contents.models.items()),
        WantedFile(LATEST_UNIVERSAL, (Literal(folder.encode()),), (), completes=True),
    ]
    return Output(files, [(source, folder) for source in target.rank_folders.values()], [], {})


# ------------------------------------------------------------------------------------------------------------
# the states


def _states(folder: str, source: Checkpoint, contents: UniversalContents) -> Iterator[WantedFile]:
    tensors = {(tensor.state, tensor.name): tensor for tensor in source.index.shards}
    names = {parameter.name: [parameter.name] for parameter in contents.parameters}
    for alias, name in contents.aliases.items():
        names[name].append(alias)
    for parameter in contents.parameters:
        parts = _parts(parameter, contents.sizes)
        there = {
            state: wanted
            for state in FILES
            if (wanted := _wanted(parameter, state, parts, tensors))
        }
        if len(there) == 2:
            raise RefusedError(
                f"{source.folder}: {parameter.name} has only one of {' and '.join(_MOMENTS)}"
            )
        for name in names[parameter.name]:
            for state, wanted in (
                there.items() if name == parameter.name else [(MAIN_PARAM, there[MAIN_PARAM])]
            ):
                tree = {**_cut(parameter, contents.sizes), PARAM: wanted.spec}
                yield _file(f"{folder}/{ZERO}/{name}/{FILES[state]}", tree, wanted)
        if parameter.name in contents.steps:
            yield _file(
                f"{folder}/{ZERO}/{parameter.name}/{STEP_FILE}", contents.steps[parameter.name]
            )


def _parts(parameter: UniversalParameter, sizes: Sizes) -> tuple[Part, ...]:
    """The parts of a whole parameter, without its vocabulary's padding."""
    return tuple(
        part
        for part in arranged(parameter.kind, parameter.shape, 1, 0, sizes)
        if part.name != PADDING
    )


def _wanted(
    parameter: UniversalParameter,
    state: str,
    parts: tuple[Part, ...],
    tensors: Mapping[tuple[str, str], LogicalTensor],
) -> Wanted | None:
    """A state of a parameter, None if it has none. What is stepped is float32, the rest as it
    is."""
    first = atom_name(parameter.canonical, parameter.kind, parts[0].name)
    if (state, first) not in tensors:
        return None
    shards = atoms(state, parameter.canonical, parameter.kind, tensors[state, first].dtype, parts)
    is_stepped = (EXP_AVG, first) in tensors
    rows = sum(shard.region.sizes[0] for shard in shards)
    shape = (rows, *parameter.shape[1:]) if parameter.shape else ()
    return Wanted(
        TensorSpec(state, "float32" if is_stepped else tensors[state, first].dtype, shape), shards
    )


def _cut(parameter: UniversalParameter, sizes: Sizes) -> dict[str, Any]:
    """What DeepSpeed is told of how ranks cut it."""
    if parameter.kind == REPLICATED:
        return {}
    parts = {"param_n_sub_params": 2} if parameter.kind == GATE_UP else {}
    vocab = {"vocab_tensor": True} if parameter.kind == VOCAB else {}
    return {"cat_dim": 1 if parameter.kind == SHARD_1 else 0, **parts, **vocab}


def _file(path: str, tree: Any, *wanted: Wanted) -> WantedFile:
    """torch.save's file of a tree, whose TensorSpecs are those of the tensors `wanted`."""
    frame = torch_zip.frame(tree, PurePath(path).name)
    return file_of_objects(path, frame, {one.spec: one for one in wanted})


# ---------------------------------------------------------------------------------------------
# DeepSpeed's own checkpoints


def _own(source: Checkpoint) -> UniversalContents:
    """Of a DeepSpeed checkpoint: names, steps, and what is beside the states as they are."""
    first = source.rank_metadata[0, 0, 0]
    models = {path.name: torch_zip.read(path) for path in find(source.folder).models.values()}
    steps = {
        name: step for meta in source.rank_metadata.values() for name, step in meta["steps"].items()
    }
    return UniversalContents(
        list(_parameters(source, first.get("functions"))),
        _sizes(source),
        steps,
        first["zero"],
        models,
        {} if first.get("functions") else dict(first.get("shared_params") or {}),
    )


def _sizes(source: Checkpoint) -> Sizes:
    heads = args_of(source.rank_metadata[0, 0, 0]).get("num_attention_heads")
    words = next(
        (tensor.rows for tensor in source.index.shards if tensor.name == WORD_EMBEDDING), None
    )
    return Sizes(heads, heads, words)


def _parameters(
    source: Checkpoint, functions: dict[int, str] | None
) -> Iterator[UniversalParameter]:
    seen, unknown = set(), []
    for held in source.index.held:
        name = held.found.name
        if held.found.state != MAIN_PARAM or name in seen or name == HEAD:
            continue
        seen.add(name)
        if held.kind is None:
            unknown.append(name)
            continue
        shape = whole_shape(held.kind, held.found.stored.shape, source.layout.tp)
        yield UniversalParameter(
            optimizer_name(name, functions) if functions else name, held.canonical, held.kind, shape
        )
    if unknown:
        raise RefusedError(
            f"{source.folder}: nobody knows how tensor-parallel ranks cut "
            f"{shorten_names(unknown)}; a model of more "
            "than one such rank must have the names of a GPT"
        )
