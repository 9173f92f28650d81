"""Writing Megatron-LM checkpoints in the layout that a sidecar records: the way back.

`<target>/iter_NNNNNNN/mp_rank_TT[_PPP][_EEE]/{model_optim_rng.pt,distrib_optim.pt}`, the tracker
file, and the sidecar, so that the result can be converted again. distrib_optim.pt comes in the
generation that the sidecar's release reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from parammap.checkpoint import extra_states
from parammap.checkpoint.checkpoint import Checkpoint, Coordinates
from parammap.checkpoint.cuts import UNRECORDED
from parammap.checkpoint.index import NameResolver, StoredTensor, TensorEntry
from parammap.checkpoint.sidecar import Bucket, Buffer, Sidecar, Slot
from parammap.checkpoint.trackers import RELEASE
from parammap.errors import RefusedError
from parammap.formats import torch_zip
from parammap.formats.frames import Literal
from parammap.formats.pickles import Global
from parammap.frameworks.megatron import before_core, registration
from parammap.frameworks.megatron.facts import Facts, grad_dtype
from parammap.frameworks.megatron.files import MODEL_FILE, OPTIMIZER_FILE, TRACKER
from parammap.frameworks.megatron.specification import Options, check_specification
from parammap.frameworks.megatron.structure import megatron_naming, rank_folder, structures_of
from parammap.plan.plan import Output, Wanted, WantedFile, file_of_objects, gap
from parammap.tensors.layout import Place
from parammap.tensors.logical import ITEMSIZE, MAIN_PARAM, LogicalTensor, Stored, TensorSpec
from parammap.tensors.names import shorten_names
from parammap.tensors.shard import Shard

#: the key of each state in distrib_optim.pt, in Megatron's order
_STATES = {MAIN_PARAM: "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
#: keys of pt_meta's files that are no part of a model file
_OURS = ("parammap_model_structure", "param_name_list")


def output(source: Checkpoint, options: Options) -> Output:
    """Plan the files. Raises RefusedError if the sidecar is missing or maps tensors that the source
    lacks, and for tensors that are not named as the arguments' model names them."""
    check_specification(source, options.transformer_impl)
    if source.with_optimizer:
        if source.sidecar is None:
            raise RefusedError(
                f"{source.folder}: nobody knows the optimizer's buckets without layout_*.json or "
                "param_map*.json; name their folder with --sidecar, or convert --weights-only"
            )
        registration.check(source.sidecar)
    writer = _RankWriter(source)
    files = [file for rank in source.rank_folders for file in writer.rank_files(rank)]
    if writer.missing:
        raise RefusedError(
            f"{source.folder}: lacks {len(writer.missing)} tensors that Megatron-LM expects: "
            f"{shorten_names(sorted(writer.missing))}"
        )
    files += [
        *sidecar_files(source, f"{writer.iteration_folder}/param_map", "param_map"),
        WantedFile(
            TRACKER, (Literal(str(source.iteration or RELEASE).encode()),), (), completes=True
        ),
    ]
    converted = [
        (folder, f"{writer.iteration_folder}/{rank_folder(source.layout, rank)}")
        for rank, folder in source.rank_folders.items()
    ]
    return Output(
        files,
        converted,
        [],
        {},
        states=tuple(_STATES) if source.with_optimizer else (MAIN_PARAM,),
        extra_states=tuple(map(str, extra_states.filled(source.structures))),
    )


@dataclass(slots=True)
class _RankWriter:
    source: Checkpoint
    missing: set[str] = field(default_factory=set)
    _tensors: dict[tuple[str, str], LogicalTensor] = field(init=False)
    _structures: dict[Coordinates, list[dict[str, Any]]] = field(init=False)
    _naming: NameResolver = field(init=False)
    _held: dict[tuple[Place, str, str], StoredTensor] = field(init=False)

    def __post_init__(self) -> None:
        self._tensors = {(tensor.state, tensor.name): tensor for tensor in self.source.index.shards}
        self._structures = structures_of(self.source)
        self._naming = megatron_naming(self.source, self._structures)
        self._held = {
            (held.found.place, held.found.name, held.found.state): held
            for held in self.source.index.held
        }

    @property
    def iteration_folder(self) -> str:
        """Without an iteration it is a release, which Megatron-LM loads without asking for an
        optimizer's state."""
        return f"iter_{self.source.iteration:07d}" if self.source.iteration else RELEASE

    def rank_files(self, rank: Coordinates) -> Iterator[WantedFile]:
        folder = f"{self.iteration_folder}/{rank_folder(self.source.layout, rank)}"
        yield self._file(f"{folder}/{MODEL_FILE}", rank, *self._model(rank))
        sidecar = self.source.sidecar if self.source.with_optimizer else None
        if sidecar and _saves_optimizer(sidecar, rank):
            yield self._file(f"{folder}/{OPTIMIZER_FILE}", rank, *self._optimizer(sidecar, rank))

    def _file(
        self, path: str, rank: Coordinates, tree: object, wanted: dict[TensorSpec, Wanted]
    ) -> WantedFile:
        return file_of_objects(path, torch_zip.frame(tree, Path(path).name), wanted, Place(*rank))

    # ----------------------------------------------------------------------------------------------
    # model_optim_rng.pt

    def _model(self, rank: Coordinates) -> tuple[dict[str, Any], dict[TensorSpec, Wanted]]:
        wanted: dict[TensorSpec, Wanted] = {}
        chunks = [
            self._chunk(rank, number, tree, wanted)
            for number, tree in enumerate(self._structures[rank])
        ]
        names = (
            ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
        )
        meta = {
            key: value
            for key, value in self.source.rank_metadata[rank].items()
            if value is not None and key not in _OURS
        }
        if not self.source.with_optimizer:
            meta.pop("optimizer", None)
        head: dict[str, Any] = {
            key: meta.pop(key) for key in ("args", "checkpoint_version", "iteration") if key in meta
        }
        return {**head, **dict(zip(names, chunks, strict=True)), **meta}, wanted

    def _chunk(
        self, rank: Coordinates, number: int, tree: object, wanted: dict[TensorSpec, Wanted]
    ) -> object:
        if isinstance(tree, TensorSpec):
            is_alone = len(self._structures[rank]) == 1
            spec = tree if is_alone else replace(tree, name=f"{number}.{tree.name}")
            wanted[spec] = Wanted(
                spec, self._parts(rank, number, tree.name, tree.shape, MAIN_PARAM)
            )
            return spec
        if isinstance(tree, dict):
            return {key: self._chunk(rank, number, value, wanted) for key, value in tree.items()}
        return tree

    # ------------------------------------------------------------------------------------------------
    # distrib_optim.pt

    def _optimizer(
        self, sidecar: Sidecar, rank: Coordinates
    ) -> tuple[object, dict[TensorSpec, Wanted]]:
        known = sidecar.ranks.get(rank)
        if known is None:
            raise RefusedError(
                f"{sidecar.folder}: says nothing of {Place(*rank)}; copy that rank's files"
            )
        wanted: dict[TensorSpec, Wanted] = {}
        chain = [
            None if buffers is None else self._buffers(sidecar, rank, number, buffers, wanted)
            for number, buffers in enumerate(known.optimizers)
        ]
        return (chain if len(chain) > 1 else chain[0]), wanted

    def _buffers(
        self,
        sidecar: Sidecar,
        rank: Coordinates,
        link: int,
        buffers: tuple[Buffer, ...],
        wanted: dict[TensorSpec, Wanted],
    ) -> dict[Any, Any]:
        coalesced = _is_coalesced(sidecar)
        per_bucket, per_bucket_unpadded, saved = [], [], {}
        for gbuf, buffer in enumerate(buffers):
            dtypes = self._dtypes(buffer)
            buckets = buffer.buckets or _buckets_of_core_0_6(
                buffer, self.source.layout.dp * self.source.layout.cp
            )
            per_bucket.append({dtypes: [bucket.end - bucket.start for bucket in buckets]})
            per_bucket_unpadded.append({dtypes: [bucket.numel_unpadded for bucket in buckets]})
            states: dict[str, Any] = {}
            for state, key in _STATES.items():
                flat = [
                    self._flat(
                        f"{link}.{gbuf}.{key}.{number}", rank, buffer, there, state, coalesced
                    )
                    for number, there in enumerate(
                        [buckets] if coalesced else [(bucket,) for bucket in buckets]
                    )
                ]
                wanted.update((one.spec, one) for one in flat)
                states[key] = flat[0].spec if coalesced else [one.spec for one in flat]
            if coalesced:
                states["numel_unpadded"] = sum(bucket.numel_unpadded for bucket in buckets)
            saved[gbuf] = {dtypes: states}
        if before_core.describes(sidecar):
            return before_core.saved(saved)
        if coalesced:
            return {"buckets_coalesced": True, **saved}
        return {
            "per_bucket_numel": per_bucket,
            "per_bucket_numel_unpadded": per_bucket_unpadded,
            **saved,
        }

    def _flat(
        self,
        name: str,
        rank: Coordinates,
        buffer: Buffer,
        buckets: tuple[Bucket, ...],
        state: str,
        coalesced: bool,
    ) -> Wanted:
        """The buckets one after the other as a flat tensor, with zeros where no parameter lies."""
        parts, numel, itemsize = [], 0, ITEMSIZE["float32"]
        for bucket in buckets:
            position, end = (
                bucket.start,
                bucket.start + bucket.numel_unpadded if coalesced else bucket.end,
            )
            before = numel - bucket.start
            for slot in sorted(buffer.slots, key=lambda slot: slot.start):
                if bucket.start <= slot.start < bucket.end:
                    parts += _gap(position + before, slot.start - position)
                    parts += [
                        replace(
                            part,
                            view=part.view.cast("float32").at("", (slot.start + before) * itemsize),
                        )
                        for part in self._parts(
                            rank, buffer.chunk, slot.name, slot.shape, state, slot
                        )
                    ]
                    position = slot.end
            parts += _gap(position + before, end - position)
            numel += end - bucket.start
        return Wanted(TensorSpec(name, "float32", (numel,)), tuple(parts))

    def _dtypes(self, buffer: Buffer) -> tuple[Global, Global]:
        """The key of a buffer: parameter and gradient dtype."""
        args = Facts.of_checkpoint(self.source).args
        return Global("torch", buffer.param_dtype or buffer.slots[0].dtype), Global(
            "torch", grad_dtype(buffer, args)
        )

    # ------------------------------------------------------------------------------------------------------------
    # names

    def _parts(
        self,
        rank: Coordinates,
        chunk: int,
        name: str,
        shape: tuple[int, ...],
        state: str,
        slot: Slot | None = None,
    ) -> tuple[Shard, ...]:
        """The parts of a rank's tensor."""
        tp, pp, ep = rank
        place = Place(tp, pp, ep, chunk)
        if own := self._held.get((place, name, state)):
            return own.parts
        found = TensorEntry(
            name, place, state, Stored("float32", shape, ()), slot.partition if slot else UNRECORDED
        )
        held = self._naming.hold(found)
        return tuple(
            replace(part, tensor=part.tensor and self._known(part.tensor)) for part in held.parts
        )

    def _known(self, wanted: LogicalTensor) -> LogicalTensor:
        """The source's tensor of that state and name, whatever its dtype; a missing one is noted."""
        there = self._tensors.get((wanted.state, wanted.name))
        if there is None:
            self.missing.add(f"{wanted.name} ({wanted.state})")
        elif there.shape != wanted.shape:
            raise RefusedError(
                f"{self.source.folder}: {wanted.name} is {list(there.shape)} and not "
                f"{list(wanted.shape)} as "
                "the sidecar says; they are of different runs"
            )
        return there or wanted


def _gap(start: int, numel: int) -> list[Shard]:
    return [gap(1, numel).at("", start * ITEMSIZE["float32"])] if numel else []


def _saves_optimizer(sidecar: Sidecar, rank: Coordinates) -> bool:
    """Whether some state is this rank's to save: without experts, another expert rank saves
    all."""
    tp, pp, ep = rank
    return ep == 0 or rank in sidecar.ranks or (tp, pp, 0) not in sidecar.ranks


def _is_coalesced(sidecar: Sidecar) -> bool:
    """Core 0.7 and later; bare maps are of core 0.6, the only release that the patch which writes
    them fits."""
    layout = sidecar.any_layout()
    if layout is None:
        return False
    major, minor = layout["framework"]["core_version"].split(".")[:2]
    return (int(major), int(minor)) >= (0, 7)


def _buckets_of_core_0_6(buffer: Buffer, dp: int) -> tuple[Bucket, ...]:
    """Bucket bounds by core 0.6's rule, where only the slots are known: a bucket's end is padded to
    a multiple of dp."""
    buckets: list[Bucket] = []
    for number in range(1 + max(slot.bucket for slot in buffer.slots)):
        start = buckets[-1].end if buckets else 0
        last = max(slot.end for slot in buffer.slots if slot.bucket == number)
        buckets.append(Bucket(start, -(-last // dp) * dp, last - start))
    return tuple(buckets)


def sidecar_files(source: Checkpoint, *folders: str) -> Iterator[WantedFile]:
    """The sidecar's files in each of the folders, with this iteration's number; they describe a run
    that saves in torch format, whatever form the state has here."""
    as_written = {"iteration": source.iteration, "checkpoint_format": "torch"}
    for name, content in source.sidecar.contents() if source.sidecar else ():
        if name.startswith("layout_"):
            content = json.dumps({**json.loads(content), **as_written}).encode()
        for folder in folders:
            yield WantedFile(f"{folder}/{name}", (Literal(content),), ())
