"""Writing Megatron-LM checkpoints of format torch_dist that every parallel layout loads: the
optimizer fully_reshardable.

`<target>/iter_NNNNNNN/{.metadata,metadata.json,common.pt,__N_0.distcp}` and the tracker file, as
megatron-core 0.15 and later save them (core/dist_checkpointing;
core/optimizer/distrib_optimizer.py, sharded_param_state_fully_reshardable). Each layer's (and
expert's) tensor is one chunk of its stack."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any

from parammap import families
from parammap.checkpoint import extra_states
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import StoredTensor, TensorEntry, in_state
from parammap.checkpoint.trackers import RELEASE
from parammap.checkpoint.training_state import TrainingState
from parammap.errors import RefusedError
from parammap.formats import torch_dist, torch_zip
from parammap.formats.frames import Literal
from parammap.formats.torch_dist import Chunk, Chunked, DistcpFile
from parammap.frameworks.megatron import specification
from parammap.frameworks.megatron.facts import Facts, args_of
from parammap.frameworks.megatron.files import TRACKER
from parammap.frameworks.megatron.reshard.rank_metadata import regrouped
from parammap.frameworks.megatron.specification import LOCAL, Specification, check_recorded
from parammap.frameworks.megatron.structure import leaves
from parammap.frameworks.megatron.target import sidecar_files
from parammap.frameworks.megatron_dist.extra_states import key_of
from parammap.frameworks.megatron_dist.reader import COMMON_FILE, naming_of
from parammap.plan.plan import Output, Wanted, WantedFile, file_of_objects
from parammap.tensors.arrangement import GROUPED, QKV_DOWN, whole_shape
from parammap.tensors.layout import Place
from parammap.tensors.logical import (
    EXP_AVG,
    EXP_AVG_SQ,
    MAIN_PARAM,
    MODEL_PARAM,
    Stored,
    TensorSpec,
)
from parammap.tensors.names import shorten_names

#: a file is closed when it has this many bytes
FILE_NBYTES = 1 << 30
_STATES = {MAIN_PARAM: "param", EXP_AVG: "exp_avg", EXP_AVG_SQ: "exp_avg_sq"}
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
#: what _build_sharded_state_dict_metadata() says of such a save (Megatron-LM,
#: training/checkpointing.py, core_r0.16.0)
_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
#: modules without weights that may ask for an extra state (Transformer Engine's attention)
_BESIDE_PROJECTION = ("self_attention.core_attention",)
_LAYER = re.compile(r"(?<=\.layers)\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
#: keys of metas that are no part of common.pt
_ELSEWHERE = ("rng_state", "parammap_model_structure", "param_name_list")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(specification.Options):
    """`ep`: expert-parallel ranks of the run that is to load it (None: the source's). Megatron-LM
    keeps experts in an optimizer of their own where there are several, and loads the state of none,
    or of one, alone."""

    ep: int | None = None


def output(source: Checkpoint, options: Options) -> Output:
    """Plan the files. Raises RefusedError where the source holds tensors that no key is known for,
    or for an `ep` that does not divide its experts."""
    check_recorded(source, options.transformer_impl)
    folder = f"iter_{source.iteration:07d}" if source.iteration else RELEASE
    tensors, stacks = _tensors(source)
    objects = _objects(tensors)
    kept = _extra_states(source, stacks, objects)
    ep = _expert_ranks(source, options, tensors)
    rng_states = _rng_states(source, args_of(source.common_metadata)) if ep == 1 else {}
    dtypes = {
        (held.found.state, held.canonical): held.found.stored.dtype for held in source.index.held
    }
    files = _DistcpWriter(tensors, dtypes).files(
        folder, objects | rng_states, _STATES if source.with_optimizer else {}
    )
    expert_dims = {
        len(tensor.held.found.stored.shape) for tensor in tensors if tensor.is_of_experts
    }
    common = torch_zip.frame(_common(source, bool(rng_states), ep, expert_dims), COMMON_FILE)
    files += [
        file_of_objects(f"{folder}/{COMMON_FILE}", common, {}),
        *(
            sidecar_files(source, f"param_map/{folder}", "param_map")
            if source.trained is None
            else ()
        ),
        WantedFile(f"{folder}/metadata.json", (Literal(json.dumps(_BACKENDS).encode()),), ()),
        WantedFile(TRACKER, (Literal(str(source.iteration or RELEASE).encode()),), ()),
    ]
    return Output(
        files,
        [(rank_folder, folder) for rank_folder in source.rank_folders.values()],
        [],
        {},
        states=tuple(_STATES) if source.with_optimizer else (MAIN_PARAM,),
        extra_states=kept,
    )


# ----------------------------------------------------------------------------------------------------------
# what to write


@dataclass(frozen=True, slots=True)
class _StackedTensor:
    """One tensor of the model: its key with what it is stacked by, and its parts; `dtype` is the
    model's own copy's."""

    key: str
    numbers: tuple[int, ...]
    stack: tuple[int, ...]
    held: StoredTensor
    dtype: str

    @property
    def is_of_experts(self) -> bool:
        return _expert(self.held) is not None or self.held.kind in GROUPED


def _expert_ranks(source: Checkpoint, options: Options, tensors: list[_StackedTensor]) -> int:
    ep = options.ep or (source.trained or source.layout).ep
    experts = len({_expert(tensor.held) for tensor in tensors if _expert(tensor.held) is not None})
    if options.ep and (experts or 1) % ep:
        raise RefusedError(
            f"{source.folder}: its {experts} experts cannot be divided over ep {ep}; choose "
            f"another --ep"
        )
    return ep


def _tensors(source: Checkpoint) -> tuple[list[_StackedTensor], _Stacks]:
    """All tensors of the model, layer by layer, and how layers and experts are stacked."""
    weights = {
        held.canonical: held
        for held in source.index.held
        if held.found.state == MAIN_PARAM and not held.is_tied_head
    }
    if unknown := sorted(
        held.found.name
        for held in weights.values()
        if held.row is None
        or held.kind == QKV_DOWN
        or not families.names_of(held.row.canonical, families.CORE)
    ):
        raise RefusedError(
            f"{source.folder}: no key of format torch_dist is known for {len(unknown)} tensors: "
            f"{shorten_names(unknown)}; convert --to megatron instead"
        )
    facts = Facts.of_checkpoint(source)
    impl = Specification.of(facts.args).impl
    rows = {canonical: held.row for canonical, held in weights.items() if held.row}
    with_experts = {held.layer for held in weights.values() if _expert(held) is not None}
    latent = bool(facts.model.get("multi_latent_attention"))
    names = {
        canonical: _core_name(
            held, rows[canonical].canonical, held.layer in with_experts and impl != LOCAL, latent
        )
        for canonical, held in weights.items()
    }
    shapes = {
        names[canonical]: whole_shape(held.kind, held.found.stored.shape, source.layout.tp)
        for canonical, held in weights.items()
        if held.kind
    }
    naming = naming_of(shapes, facts)
    stacks, dtypes = _Stacks.of(shapes), _model_dtypes(source)
    tensors = []
    for canonical, held in weights.items():
        name, dtype = names[canonical], held.found.stored.dtype
        whole = naming.hold(TensorEntry(name, Place(), MAIN_PARAM, Stored(dtype, shapes[name], ())))
        tensors.append(
            _StackedTensor(*stacks.place(name), whole, dtypes.get(rows[canonical].canonical, dtype))
        )
    return sorted(
        tensors, key=lambda tensor: -1 if tensor.held.layer is None else tensor.held.layer
    ), stacks


@dataclass(frozen=True, slots=True)
class _Stacks:
    """How many layers and experts are stacked; layers that are not alike are not stacked: their
    numbers stay in the keys."""

    layers: int | None
    experts: int

    @classmethod
    def of(cls, shapes: dict[str, tuple[int, ...]]) -> _Stacks:
        in_layer: dict[int, set[tuple[str, tuple[int, ...]]]] = {}
        experts = [int(match.group(1)) for name in shapes if (match := _EXPERT.search(name))]
        for name, shape in shapes.items():
            if match := _LAYER.search(name):
                in_layer.setdefault(int(match.group(1)), set()).add((name[match.end() :], shape))
        alike = all(there == in_layer[0] for there in in_layer.values())
        return cls(len(in_layer) if alike else None, 1 + max(experts, default=-1))

    def place(self, name: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """A name's key, its numbers in the stack, and the size of the stack."""
        numbers = []
        if self.layers and (match := _LAYER.search(name)):
            name = name[: match.start()] + "." + name[match.end() :]
            numbers.append((int(match.group(1)), self.layers))
        if match := _EXPERT.search(name):
            name = name[: match.start()] + ".experts." + name[match.end() :]
            numbers.append((int(match.group(1)), self.experts))
        return name, tuple(number for number, _ in numbers), tuple(size for _, size in numbers)


def _core_name(held: StoredTensor, pattern: str, keeps_norm: bool, latent: bool) -> str:
    """The name, with global numbers, by which keys are made; `pattern` is the canonical name of
    its row. Norms are called as Transformer Engine's layers fuse them, but for those before a
    mixture of experts (`keeps_norm`) and before `latent` attention, which are apart."""
    names = families.names_of(pattern, families.CORE)
    first, last = names[0], names[-1]
    is_apart = (keeps_norm and ".post_attention_norm." in pattern) or (
        latent and ".input_norm." in pattern
    )
    name = last if "norm" in last and not is_apart else first
    return name.format(i=held.layer, e=_expert(held))


def _expert(held: StoredTensor) -> int | None:
    match = re.search(r"\.experts\.(\d+)\.", held.canonical)
    return int(match.group(1)) if match else None


def _model_dtypes(source: Checkpoint) -> dict[str, str]:
    """The dtype that the model computes each kind of tensor in, as it was saved."""
    dtypes = {
        held.row.canonical: held.found.stored.dtype
        for held in source.index.held
        if held.found.state == MODEL_PARAM and held.row
    }
    specs = [spec for trees in source.structures.values() for spec in leaves(trees, TensorSpec)]
    dialect = families.dialect_of([spec.name for spec in specs])
    return {
        row.canonical: spec.dtype for spec in specs if (row := families.find(spec.name, dialect))
    } | dtypes


# ------------------------------------------------------------------------------------------------------------------
# files


@dataclass(slots=True)
class _DistcpWriter:
    """Lays the tensors out in files, and keeps the books for `.metadata`. `dtypes` are the
    source's, by state and atom."""

    tensors: list[_StackedTensor]
    dtypes: dict[tuple[str, str], str]
    _files: list[DistcpFile] = field(default_factory=list)
    _wanted: dict[TensorSpec, Wanted] = field(default_factory=dict)
    _chunks: dict[tuple[str, str, tuple[int, ...]], list[Chunk]] = field(default_factory=dict)

    def files(
        self, folder: str, objects: dict[str, object], states: dict[str, str]
    ) -> list[WantedFile]:
        """The .distcp files with the objects and every tensor, and `.metadata`."""
        archives = {key: self._file().add([value]) for key, value in objects.items()}
        for tensor in self.tensors:
            self._add(tensor, tensor.key, tensor.dtype, MAIN_PARAM)
            for state, key in states.items():
                self._add(
                    tensor,
                    f"optimizer.state.{key}.{tensor.key}",
                    self.dtypes[state, tensor.held.canonical],
                    state,
                )
        chunked = [
            Chunked(key, dtype, shape, tuple(chunks))
            for (key, dtype, shape), chunks in self._chunks.items()
        ]
        files = [
            file_of_objects(f"{folder}/{file.name}", file.frame, self._wanted)
            for file in self._files
        ]
        described = torch_dist.metadata(chunked, archives)
        return [*files, WantedFile(f"{folder}/{torch_dist.METADATA}", (Literal(described),), ())]

    def _file(self) -> DistcpFile:
        if not self._files or self._files[-1].nbytes >= FILE_NBYTES:
            self._files.append(DistcpFile(f"__{len(self._files)}_0.distcp"))
        return self._files[-1]

    def _add(self, tensor: _StackedTensor, key: str, dtype: str, state: str) -> None:
        shape, source_dtype = (
            tensor.held.found.stored.shape,
            self.dtypes[state, tensor.held.canonical],
        )
        sizes = (*(1 for _ in tensor.numbers), *shape)
        spec = TensorSpec(f"{key}{list(tensor.numbers)}", dtype, sizes)
        self._wanted[spec] = Wanted(spec, in_state(tensor.held, state, source_dtype).parts)
        chunk = Chunk((*tensor.numbers, *(0 for _ in shape)), sizes, self._file().add(spec))
        self._chunks.setdefault((key, dtype, (*tensor.stack, *shape)), []).append(chunk)


def _objects(tensors: list[_StackedTensor]) -> dict[str, object]:
    """An empty extra state for each module that may ask for one."""
    objects: dict[str, object] = {}
    for tensor in tensors:
        module, _, _ = tensor.key.rpartition(".")
        beside = (
            module.replace("self_attention.linear_proj", other) for other in _BESIDE_PROJECTION
        )
        for name in (module, *beside) if module.startswith("decoder.") else ():
            objects[key_of(f"{name}.{extra_states.KEY}", tensor.numbers, tensor.stack)] = None
    return objects


def _extra_states(
    source: Checkpoint, stacks: _Stacks, objects: dict[str, object]
) -> tuple[str, ...]:
    """Put those of a model in one rank, which are cut for no layout, in their places in `objects`;
    gives their names."""
    if len(source.rank_folders) > 1:
        return ()
    placed = {
        key_of(*stacks.place(one.name)): one for one in extra_states.filled(source.structures)
    }
    kept = {key: one for key, one in placed.items() if key in objects}
    objects |= {key: one.value for key, one in kept.items()}
    return tuple(map(str, kept.values()))


def _rng_states(source: Checkpoint, args: dict[str, Any]) -> dict[str, object]:
    """The random states by pipeline and tensor rank, if those of every rank are known."""
    tp, pp = (
        args.get("tensor_model_parallel_size") or 1,
        args.get("pipeline_model_parallel_size") or 1,
    )
    states = {
        (p, t): source.training_states.get((t, p, 0), TrainingState()).random_state
        for p in range(pp)
        for t in range(tp)
    }
    if any(state is None for state in states.values()) or (source.trained or source.layout).ep > 1:
        return {}
    return {f"rng_state/shard_{p}.{t}_{pp}.{tp}": state for (p, t), state in states.items()}


def _common(source: Checkpoint, with_rng: bool, ep: int, expert_dims: set[int]) -> dict[str, Any]:
    """common.pt. Where the random states are not known, its arguments say that they were not
    saved."""
    meta = source.common_metadata
    common = {
        key: value for key, value in meta.items() if value is not None and key not in _ELSEWHERE
    }
    if "args" in common:
        known = (
            {"expert_model_parallel_size": ep}
            if "expert_model_parallel_size" in common["args"].attributes
            else {}
        )
        unsaved = {} if with_rng else {"no_save_rng": True}
        common["args"] = replace(
            common["args"], state={**common["args"].attributes, **known, **unsaved}
        )
    optimizer = common.pop("optimizer", None)
    if source.with_optimizer and optimizer is not None:
        optimizer = regrouped(optimizer, ep > 1, expert_dims)
        sharding = {"param_state_sharding_type": _CONTENT["distrib_optim_sharding_type"]}
        common["optimizer"] = (
            {number: {**link, **sharding} for number, link in enumerate(optimizer)}
            if isinstance(optimizer, list)
            else {**optimizer, **sharding}
        )
    return {**common, "content_metadata": _CONTENT}
