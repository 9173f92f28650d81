"""Writing Megatron-LM checkpoints in the layout that a sidecar records: the way back.

`<target>/iter_NNNNNNN/mp_rank_TT[_PPP][_EEE]/{model_optim_rng.pt,distrib_optim.pt}`, the tracker file, and the sidecar,
so that the result can be converted again. distrib_optim.pt comes in the generation that the sidecar's release reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import families
from ..checkpoint import Checkpoint, Coordinates
from ..containers import torch_zip
from ..containers.frames import Literal
from ..containers.pickles import Global
from ..errors import RefusedError
from ..index import Found, Naming
from ..layout import Place
from ..naming import brief
from ..plan import Output, Wanted, WantedFile
from ..sidecar import Bucket, Buffer, Sidecar, Slot
from ..tensors import WEIGHT, Box, Stored, Tensor, TensorSpec
from .megatron import MODEL_FILE, OPTIMIZER_FILE, TRACKER
from .megatron_facts import Facts, experts_per_rank, global_layers, is_gated
from .megatron_structure import leaves, structures_from_slots

#: the key of each role in distrib_optim.pt, in Megatron's order
_STATES = {WEIGHT: "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
#: keys of pt_meta's files that are no part of a model file
_OURS = ("parammap_model_structure", "param_name_list")


def output(source: Checkpoint) -> Output:
    """Plan the files. Raises RefusedError if the sidecar is missing or maps tensors that the source lacks."""
    if source.sidecar is None and source.with_optimizer:
        raise RefusedError(f"{source.folder}: nobody knows the optimizer's buckets without layout_*.json or "
                           "param_map*.json; name their folder with --sidecar, or convert --weights-only")
    writer = _Writer(source)
    files = [file for rank in source.rank_folders for file in writer.rank_files(rank)]
    if writer.missing:
        raise RefusedError(f"{source.folder}: lacks {len(writer.missing)} tensors that Megatron-LM expects: "
                           f"{brief(sorted(writer.missing))}")
    files += [*_sidecar_files(source, writer.iteration_folder),
              WantedFile(TRACKER, (Literal(str(source.iteration).encode()),), ())]
    converted = [(folder, f"{writer.iteration_folder}/{_rank_folder(source, rank)}")
                 for rank, folder in source.rank_folders.items()]
    return Output(files, converted, [], {})


@dataclass(slots=True)
class _Writer:
    source: Checkpoint
    missing: set[str] = field(default_factory=set)
    _tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _naming: Naming | None = None

    def __post_init__(self) -> None:
        self._tensors = {(tensor.role, tensor.name): tensor for tensor in self.source.index.boxes}
        self._naming = self._target_naming()

    @property
    def iteration_folder(self) -> str:
        return f"iter_{self.source.iteration:07d}"

    def rank_files(self, rank: Coordinates) -> Iterator[WantedFile]:
        folder = f"{self.iteration_folder}/{_rank_folder(self.source, rank)}"
        yield self._file(f"{folder}/{MODEL_FILE}", rank, *self._model(rank))
        if self.source.with_optimizer:
            yield self._file(f"{folder}/{OPTIMIZER_FILE}", rank, *self._optimizer(rank))

    def _file(self, path: str, rank: Coordinates, tree: object, wanted: dict[TensorSpec, Wanted]) -> WantedFile:
        frame = torch_zip.frame(tree, Path(path).name)
        tensors = tuple(wanted[leaf] if isinstance(leaf, TensorSpec) else
                        Wanted(TensorSpec(f"{path}:{number}", leaf.dtype, leaf.shape), source=leaf)
                        for number, leaf in enumerate(frame.tensors))
        return WantedFile(path, tuple(frame.segments), tensors, Place(*rank))

    # ---------------------------------------------------------------------------------------------- model_optim_rng.pt

    def _model(self, rank: Coordinates) -> tuple[dict, dict[TensorSpec, Wanted]]:
        wanted: dict[TensorSpec, Wanted] = {}
        chunks = [self._chunk(rank, number, tree, wanted) for number, tree in enumerate(self._structures(rank))]
        names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
        meta = {key: value for key, value in self.source.metas[rank].items() if value is not None and key not in _OURS}
        if not self.source.with_optimizer:
            meta.pop("optimizer", None)
        head = {key: meta.pop(key) for key in ("args", "checkpoint_version", "iteration") if key in meta}
        return {**head, **dict(zip(names, chunks, strict=True)), **meta}, wanted

    def _chunk(self, rank: Coordinates, number: int, tree: object, wanted: dict[TensorSpec, Wanted]) -> object:
        if isinstance(tree, TensorSpec):
            spec = replace(tree, name=f"{number}.{tree.name}")
            blocks = self._blocks(rank, number, tree.name, tree.shape, WEIGHT)
            wanted[spec] = Wanted(spec, blocks)
            return spec
        if isinstance(tree, dict):
            return {key: self._chunk(rank, number, value, wanted) for key, value in tree.items()}
        return tree

    def _structures(self, rank: Coordinates) -> list[dict]:
        structures = self.source.structures.get(rank)
        if structures:
            return structures
        if self.source.sidecar is None:
            raise RefusedError(f"{self.source.folder}: neither the model's structure nor a sidecar is recorded in pt_meta; "
                               "name the folder of the sidecar with --sidecar")
        return structures_from_slots(self.source.sidecar, rank, self.source.layout.vpp)

    # ------------------------------------------------------------------------------------------------ distrib_optim.pt

    def _optimizer(self, rank: Coordinates) -> tuple[object, dict[TensorSpec, Wanted]]:
        sidecar = self.source.sidecar.ranks.get(rank)
        if sidecar is None:
            raise RefusedError(f"{self.source.sidecar.folder}: says nothing of {Place(*rank)}; copy that rank's files")
        wanted: dict[TensorSpec, Wanted] = {}
        chain = [None if buffers is None else self._buffers(rank, number, buffers, wanted)
                 for number, buffers in enumerate(sidecar.optimizers)]
        return (chain if len(chain) > 1 else chain[0]), wanted

    def _buffers(self, rank: Coordinates, link: int, buffers: tuple[Buffer, ...], wanted: dict) -> dict:
        coalesced = _is_coalesced(self.source.sidecar)
        per_bucket, per_bucket_unpadded, saved = [], [], {}
        for gbuf, buffer in enumerate(buffers):
            dtypes = self._dtypes(buffer)
            buckets = buffer.buckets or _buckets_of_core_0_6(buffer, self.source.layout.dp * self.source.layout.cp)
            per_bucket.append({dtypes: [bucket.end - bucket.start for bucket in buckets]})
            per_bucket_unpadded.append({dtypes: [bucket.numel_unpadded for bucket in buckets]})
            states = {}
            for role, key in _STATES.items():
                runs = [list(self._bucket(rank, buffer, bucket, role, coalesced)) for bucket in buckets]
                if coalesced:
                    runs = [[block for run in runs for block in run]]
                specs = [_flat_spec(f"{link}.{gbuf}.{key}.{number}", run) for number, run in enumerate(runs)]
                wanted.update((spec, Wanted(spec, tuple(run))) for spec, run in zip(specs, runs, strict=True))
                states[key] = specs[0] if coalesced else specs
            if coalesced:
                states["numel_unpadded"] = sum(bucket.numel_unpadded for bucket in buckets)
            saved[gbuf] = {dtypes: states}
        if coalesced:
            return {"buckets_coalesced": True, **saved}
        return {"per_bucket_numel": per_bucket, "per_bucket_numel_unpadded": per_bucket_unpadded, **saved}

    def _bucket(self, rank: Coordinates, buffer: Buffer, bucket: Bucket, role: str, coalesced: bool) -> Iterator:
        """The boxes of one bucket in order, with gaps (no tensor) where no parameter lies."""
        position = bucket.start
        end = bucket.start + bucket.numel_unpadded if coalesced else bucket.end
        for slot in sorted(buffer.slots, key=lambda slot: slot.start):
            if bucket.start <= slot.start < bucket.end:
                yield from _gap(slot.start - position)
                yield from self._blocks(rank, buffer.chunk, slot.name, slot.shape, role, slot)
                position = slot.end
        yield from _gap(end - position)

    def _dtypes(self, buffer: Buffer) -> tuple[Global, Global]:
        """The key of a buffer: parameter and gradient dtype. Megatron-LM reduces bf16 gradients in float32 always."""
        param = buffer.param_dtype or buffer.slots[0].dtype
        args = Facts.of(self.source.sidecar, next(iter(self.source.metas.values()))).args
        in_fp32 = param == "bfloat16" or args.get("accumulate_allreduce_grads_in_fp32")
        grad = buffer.grad_dtype or ("float32" if in_fp32 else param)
        return Global("torch", param), Global("torch", grad)

    # ------------------------------------------------------------------------------------------------------------ names

    def _blocks(self, rank: Coordinates, chunk: int, name: str, shape: tuple[int, ...], role: str,
                slot: Slot | None = None) -> tuple[tuple[Tensor, Box], ...]:
        tp, pp, ep = rank
        found = Found(name, Place(tp, pp, ep, chunk), role, Stored("float32", shape, ()),
                      *((slot.partition_dim, slot.partition_stride, slot.expert) if slot else ()))
        blocks = self._naming.hold(found).blocks
        for there in self.source.index.holders.get(blocks[0][0], ()):
            if there.blocks == blocks:
                return there.blocks
        return tuple((self._known(tensor), box) for tensor, box in blocks)

    def _known(self, wanted: Tensor) -> Tensor:
        """The source's tensor of that role and name, whatever its dtype; a missing one is noted."""
        there = self._tensors.get((wanted.role, wanted.name))
        if there is None:
            self.missing.add(f"{wanted.name} ({wanted.role})")
        elif there.shape != wanted.shape:
            raise RefusedError(f"{self.source.folder}: {wanted.name} is {list(there.shape)} and not {list(wanted.shape)} as "
                               "the sidecar says; they are of different runs")
        return there or wanted

    def _target_naming(self) -> Naming:
        source = self.source
        meta = next(iter(source.metas.values()), {})
        slots: dict = dict(_slots(source.sidecar))
        if not slots:
            slots = {(rank, number, spec.name): spec for rank, trees in source.structures.items()
                     for number, tree in enumerate(trees) for spec in leaves(tree, TensorSpec)}
        names = [name for _, _, name in slots]
        dialect = families.dialect_of(names)
        groups: dict[tuple, dict[str, tuple[int, ...]]] = {}
        for (rank, chunk, name), slot in slots.items():
            groups.setdefault((rank, chunk), {})[name] = slot.shape
        return Naming(dialect, source.layout,
                      global_layers(((rank[1], chunk), names) for (rank, chunk), names in groups.items()),
                      experts_per_rank(names),
                      Facts.of(source.sidecar, meta).heads(), is_gated(groups.values(), dialect))


def _slots(sidecar: Sidecar | None) -> Iterator[tuple[tuple[Coordinates, int, str], Slot]]:
    for rank, known in (sidecar.ranks if sidecar else {}).items():
        for buffers in known.optimizers:
            for buffer in buffers or ():
                for slot in buffer.slots:
                    yield (rank, buffer.chunk, slot.name), slot


def _gap(numel: int) -> Iterator[tuple[None, Box]]:
    if numel:
        yield None, Box(0, 1, 0, numel)


def _flat_spec(name: str, blocks: list[tuple[Tensor | None, Box]]) -> TensorSpec:
    return TensorSpec(name, "float32", (sum(box.numel for _, box in blocks),))


def _is_coalesced(sidecar: Sidecar) -> bool:
    """Core 0.7 and later; bare maps are of core 0.6, the only release that the patch which writes them fits."""
    layout = sidecar.any_layout()
    if layout is None:
        return False
    major, minor = layout["framework"]["core_version"].split(".")[:2]
    return (int(major), int(minor)) >= (0, 7)


def _buckets_of_core_0_6(buffer: Buffer, dp: int) -> tuple[Bucket, ...]:
    """Bucket bounds by core 0.6's rule, where only the slots are known: a bucket's end is padded to a multiple of dp."""
    buckets: list[Bucket] = []
    for number in range(1 + max(slot.bucket for slot in buffer.slots)):
        start = buckets[-1].end if buckets else 0
        last = max(slot.end for slot in buffer.slots if slot.bucket == number)
        buckets.append(Bucket(start, -(-last // dp) * dp, last - start))
    return tuple(buckets)


def _rank_folder(source: Checkpoint, rank: Coordinates) -> str:
    tp, pp, ep = rank
    return (f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if source.layout.pp > 1 else "")
            + (f"_{ep:03d}" if source.layout.ep > 1 else ""))


def _sidecar_files(source: Checkpoint, iteration_folder: str) -> Iterator[WantedFile]:
    """The sidecar's files in the iteration's folder and as the latest in the root, with this iteration's number."""
    for path in source.sidecar.files if source.sidecar else []:
        content = path.read_bytes()
        if path.name.startswith("layout_"):
            content = json.dumps({**json.loads(content), "iteration": source.iteration}).encode()
        for folder in (f"{iteration_folder}/param_map", "param_map"):
            yield WantedFile(f"{folder}/{path.name}", (Literal(content),), ())
