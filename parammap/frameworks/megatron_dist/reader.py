"""Megatron-LM checkpoints of format torch_dist: one folder that all ranks write into, with the
tensors of the whole model.

Layout on disk: `<save>/latest_checkpointed_iteration.txt`,
`<save>/iter_NNNNNNN/{.metadata,metadata.json,common.pt}` and `<save>/iter_NNNNNNN/__R_W.distcp`;
from core 0.19 on common.pt is an object in the .distcp files (Megatron-LM, core/dist_checkpointing,
core_r0.8.0 … main).

The optimizer's state comes as tensors of the model's shapes (`fully_reshardable`,
`fully_sharded_model_space`) or as the distributed optimizer's buckets (`dp_reshardable`,
`fully_sharded_bucket_space`), which only a sidecar can read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from parammap import families
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import Index, NameResolver, StoredTensor, in_state
from parammap.checkpoint.sidecar import Sidecar
from parammap.checkpoint.trackers import RELEASE
from parammap.errors import RefusedError
from parammap.formats import torch_dist, torch_zip, tree_schema
from parammap.formats.torch_dist import Contents
from parammap.frameworks.framework import EVERYTHING, ReadOptions
from parammap.frameworks.megatron import files as megatron
from parammap.frameworks.megatron import registration
from parammap.frameworks.megatron.chunks import Stack, joined, parts_of, stack_of, whole_of
from parammap.frameworks.megatron.facts import Facts, is_gated
from parammap.frameworks.megatron.optimizer import dropped
from parammap.frameworks.megatron.saved import METADATA
from parammap.frameworks.megatron.specification import Specification
from parammap.frameworks.megatron.training_state import training_states
from parammap.frameworks.megatron_dist import buckets as megatron_dist_buckets
from parammap.frameworks.megatron_dist import extra_states as megatron_dist_extra_states
from parammap.frameworks.megatron_dist import sidecar as megatron_dist_sidecar
from parammap.tensors.layout import Layout
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, MAIN_PARAM, MODEL_PARAM, TensorSpec
from parammap.tensors.names import shorten_names

COMMON_FILE, COMMON_OBJECT = "common.pt", "common_state/shard_0_1"
_ITERATION_FOLDER = re.compile(r"iter_\d{7}|release")
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.")
_GROUPS = re.compile(
    r"optimizer\.distributed\.dp_group_idx_0\.(?!per_bucket|param_state)(\w+)/shard_0_1"
)
#: state of a state by its name in a key; the others keep their name
_STATES = {"param": MAIN_PARAM, "fp32_param": MAIN_PARAM}
#: what common.pt holds that model_optim_rng.pt does not
_OURS = ("content_metadata",)
_SHARDING = "param_state_sharding_type"


def recognizes(source: Path) -> bool:
    return torch_dist.recognizes(source) or (
        source.is_dir()
        and any(
            torch_dist.recognizes(folder)
            for folder in source.iterdir()
            if _ITERATION_FOLDER.fullmatch(folder.name)
        )
    )


def read(source: Path, options: ReadOptions = EVERYTHING) -> Checkpoint:
    """Read a checkpoint's headers and sidecar; it is presented as that of one rank, and `trained`
    is the run's layout.

    Raises RefusedError for anything missing, damaged or contradictory.
    """
    folder, number = megatron.find_iteration(source, options.iteration)
    contents = torch_dist.read(folder)
    common = _common(contents)
    weights_only = options.weights_only or (
        folder.name == RELEASE
        and not common.get("optimizer")
        and not any(map(_OPTIMIZER.match, contents.tensors))
    )
    sidecar = None if weights_only else _sidecar(contents, number, options.sidecar_folder)
    facts = Facts.of(sidecar, common)
    trained = facts.layout({})
    stacks = {
        key: stack_of(tensor, contents.mcore, key)
        for key, tensor in contents.tensors.items()
        if not _OPTIMIZER.match(key)
    }
    shapes = {stack.name((0,) * stack.axes): stack.inner for stack in stacks.values()}
    naming = naming_of(shapes, facts)
    kept = {
        key: stack
        for key, stack in stacks.items()
        if not any(
            options.drop and dropped(stack.name(numbers), options.drop)
            for numbers in stack.numbers()
        )
    }
    parts = {MODEL_PARAM: _model(contents, kept, naming)}
    wholes = _wholes(kept, naming, contents)
    experts = max(
        (stack.shape[stack.axes - 1] for stack in stacks.values() if stack.with_experts), default=0
    )
    of_run = megatron_dist_sidecar.of_run(naming, trained, sidecar, experts) if sidecar else None
    if not weights_only:
        held = (
            megatron_dist_buckets.states(contents, sidecar, of_run)
            if sidecar and of_run and megatron_dist_buckets.are_in(contents)
            else _in_model_space(contents, kept, naming)
        )
        parts |= _by_state(held, {whole.canonical for whole in wholes}, folder)
    index = _index(parts, wholes, trained)
    index.check_complete()
    presented = (
        megatron_dist_sidecar.in_one_rank(sidecar, of_run, wholes, experts // trained.ep)
        if sidecar and of_run
        else None
    )
    specification = Specification.of(facts.args)
    tensors = _structure(stacks, contents, naming, presented, specification)
    extra_states, merged = megatron_dist_extra_states.read(contents, specification)
    metadata = {(0, 0, 0): _meta(contents, common)}
    return Checkpoint(
        "megatron-dist",
        folder,
        number,
        Layout(),
        index,
        not weights_only,
        facts.num_layers() or index.num_layers(),
        rank_folders={(0, 0, 0): folder},
        rank_metadata=metadata,
        training_states=training_states(metadata),
        structures={(0, 0, 0): [tensors | specification.extra_states(tensors) | extra_states]},
        sidecar=presented,
        trained=trained,
        dropped=merged
        + sorted(
            {
                stack.name(numbers)
                for key, stack in stacks.items()
                if key not in kept
                for numbers in stack.numbers()
            }
        ),
    )


def _sidecar(contents: Contents, number: int, given: Path | None) -> Sidecar | None:
    """The sidecar; tensors of the model's shapes can do without one."""
    sidecar = megatron_dist_sidecar.find(contents.folder, number, given)
    if megatron_dist_buckets.are_in(contents):
        if sidecar is None:
            raise RefusedError(
                f"{contents.folder.parent / 'param_map'}: no layout_*.json of iteration {number} "
                f"here, so "
                f"nobody knows what lies where in the buckets; name their folder with --sidecar, "
                f"or "
                "convert --weights-only"
            )
    elif sidecar:
        megatron_dist_sidecar.check_positions(sidecar, contents.folder)
    if sidecar:
        registration.check(sidecar)
    return sidecar


# ---------------------------------------------------------------------------------------------------
# what is no tensor


def _common(contents: Contents) -> dict[str, Any]:
    """What all ranks have in common: common.pt, or, from core 0.19 on, an object."""
    if (contents.folder / COMMON_FILE).is_file():
        common = torch_zip.read(contents.folder / COMMON_FILE)
    elif COMMON_OBJECT in contents.objects:
        common = contents.load(COMMON_OBJECT)
        common = common[0] if isinstance(common, list) else common
    else:
        raise RefusedError(f"{contents.folder / COMMON_FILE}: missing; copy the whole checkpoint")
    tree_schema.check(common, METADATA, contents.folder / COMMON_FILE)
    return dict(common)


def _meta(contents: Contents, common: dict[str, Any]) -> dict[str, Any]:
    """All but the model, as model_optim_rng.pt has it: with rank 0's optimizer groups and random
    states."""
    meta = {key: value for key, value in common.items() if key not in _OURS}
    if "optimizer" in meta:
        meta["optimizer"] = _groups(contents, meta["optimizer"])
    for key in sorted(contents.objects):
        if key.startswith("rng_state/") and "rng_state" not in meta:
            (meta["rng_state"],) = contents.load(key)
    return meta


def _groups(
    contents: Contents, optimizer: dict[Any, Any], prefix: str = ""
) -> dict[str, Any] | list[Any]:
    """The state dict of an optimizer without tensors; a chain's, {0: …, 1: …}, becomes the list
    that torch saves."""
    if optimizer and all(isinstance(key, int) for key in optimizer):
        return [_groups(contents, optimizer[key], f"chained_{key}.") for key in sorted(optimizer)]
    groups = {
        key: value for key, value in optimizer.items() if key not in (_SHARDING, "param_state")
    }
    for key in sorted(contents.objects):
        match = _GROUPS.fullmatch(key.removeprefix(prefix))
        if match and match.group(1) not in groups:
            (groups[match.group(1)],) = contents.load(key)
    return groups


def naming_of(shapes: dict[str, tuple[int, ...]], facts: Facts) -> NameResolver:
    """What turns the names of a whole model in one rank, whose tensors have these shapes, into
    canonical ones."""
    return NameResolver(
        families.CORE,
        Layout(),
        None,
        None,
        facts.sizes(),
        is_gated([shapes], families.CORE),
        facts.tied(),
    )


def _structure(
    stacks: dict[str, Stack],
    contents: Contents,
    naming: NameResolver,
    sidecar: Sidecar | None,
    specification: Specification,
) -> dict[str, Any]:
    """The state dict of the whole model in one rank, in the order in which it registers its
    tensors, by the names that the model itself has: those of the sidecar of one rank, else what its
    arguments tell."""
    names = megatron_dist_sidecar.names(sidecar, naming) if sidecar else {}
    specs = {}
    for key, stack in stacks.items():
        dtype = contents.tensors[key].dtype
        for numbers in stack.numbers():
            whole = whole_of(stack, numbers, MODEL_PARAM, dtype, naming)
            name = names.get(whole.canonical) or specification.own_name(stack.name(numbers))
            specs[name] = TensorSpec(name, dtype, stack.inner)
    return {
        name: specs[name] for name in registration.in_order(specs, registration.recorded(sidecar))
    }


# --------------------------------------------------------------------------------------------------------
# tensors


def _model(
    contents: Contents, stacks: dict[str, Stack], naming: NameResolver
) -> list[StoredTensor]:
    return [
        part
        for key, stack in stacks.items()
        for _, part in parts_of(contents.tensors[key], stack, MODEL_PARAM, naming)
    ]


def _by_state(
    held: Iterable[StoredTensor], known: set[str], folder: Path
) -> dict[str, list[StoredTensor]]:
    """What is held of each state of the optimizer. Raises RefusedError unless every parameter has
    all of them."""
    states: dict[str, list[StoredTensor]] = {}
    for one in held:
        if one.canonical in known:
            states.setdefault(one.found.state, []).append(one)
    if MAIN_PARAM not in states:
        raise RefusedError(
            f"{folder}: holds no optimizer state of a kind that is known; convert --weights-only"
        )
    stepped = {state: {one.canonical for one in held} for state, held in states.items()}
    for state in (EXP_AVG, EXP_AVG_SQ):
        if missing := sorted(stepped[MAIN_PARAM] - stepped.get(state, set())):
            raise RefusedError(
                f"{folder}: lacks the {state} of {len(missing)} tensors: {shorten_names(missing)}"
            )
    return states


def _in_model_space(
    contents: Contents, stacks: dict[str, Stack], naming: NameResolver
) -> Iterator[StoredTensor]:
    for key, tensor in contents.tensors.items():
        match = _STATE.fullmatch(key)
        if match and match.group(2) in stacks:
            state = _STATES.get(match.group(1), match.group(1))
            yield from (
                part
                for _, part in parts_of(
                    tensor, stack_of(tensor, contents.mcore, match.group(2)), state, naming
                )
            )


def _wholes(
    stacks: dict[str, Stack], naming: NameResolver, contents: Contents
) -> list[StoredTensor]:
    return [
        whole_of(stack, numbers, MODEL_PARAM, contents.tensors[key].dtype, naming)
        for key, stack in stacks.items()
        for numbers in stack.numbers()
    ]


def _index(
    parts: dict[str, list[StoredTensor]], wholes: list[StoredTensor], trained: Layout
) -> Index:
    """The index of the parts, that lists whole tensors: states first, and the model's copies after
    them."""
    by_state: dict[str, dict[str, list[StoredTensor]]] = {}
    for state, held in parts.items():
        for part in held:
            by_state.setdefault(state, {}).setdefault(part.canonical, []).append(part)
    model, weights = by_state.pop(MODEL_PARAM), by_state.setdefault(MAIN_PARAM, {})
    own = (
        model.keys() - weights.keys()
    )  # no optimizer steps these (frozen, or buffers): the model's copy is the weight
    weights.update(
        (name, [in_state(part, MAIN_PARAM) for part in held])
        for name, held in model.items()
        if name in own
    )
    by_state[MODEL_PARAM] = {name: held for name, held in model.items() if name not in own}
    index = Index(
        [part for states in by_state.values() for held in states.values() for part in held], trained
    )
    index.held = [
        joined(
            states[whole.canonical],
            in_state(whole, state, states[whole.canonical][0].found.stored.dtype),
        )
        for state, states in by_state.items()
        for whole in wholes
        if whole.canonical in states
    ]
    return index
