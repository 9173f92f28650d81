"""Writing metaseq checkpoints: a singleton, whole tensors per part, or flat parameters cut into
FSDP shards.

Each file is torch.save's: `model`, then what the source's file of that part keeps beside it. A flat
parameter is the parameters of one FSDP module one after the other; shard r of n elements over dp is
[r·c, (r+1)·c) with c = ceil(n / dp), filled up with zeros, of which `shard_metadata` counts those
of its own shard (fairscale 0.4.13, FullyShardedDataParallel, _get_shard and local_metadata_dict).
Optimizer states are cut just so (metaseq, trainer.py, save_checkpoint)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import StoredTensor
from parammap.errors import RefusedError
from parammap.formats import torch_zip
from parammap.formats.pickles import Opaque
from parammap.frameworks.metaseq import reader as metaseq
from parammap.frameworks.metaseq import sidecar
from parammap.frameworks.metaseq.metadata import EMBEDDING, OUTPUT, Flat, join, usual
from parammap.frameworks.metaseq.reshard import FUSED, SPLIT, with_parts
from parammap.plan.plan import Output, Wanted, WantedFile, file_of_objects, gap, in_a_row
from parammap.tensors.arrangement import KVQ
from parammap.tensors.layout import Place
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, ITEMSIZE, MAIN_PARAM, Stored, TensorSpec
from parammap.tensors.names import shorten_names
from parammap.tensors.shard import Shard

#: what a part's file can hold: whole tensors with k, v and q apart, whole tensors, or flat
#: parameters in shards
SINGLETON, WHOLE, FLAT = "singleton", "whole", "flat"
#: file names, {part} and {shard} standing for their numbers
NAMES = {
    SINGLETON: "restored.pt",
    WHOLE: "reshard-model_part-{part}.pt",
    FLAT: "checkpoint_{updates}-model_part-{part}-shard{shard}.pt",
}
_MOMENTS = (EXP_AVG, EXP_AVG_SQ)
#: keys of a source's meta that are made anew, or are ours
_OWN = ("model", "shard_metadata", "last_optimizer_state", "optimizer_index")


@dataclass(frozen=True, slots=True)
class Options:
    """How to write. `name` is a file name with {part}, {shard} and {updates}, '' for the form's
    own; `shards` None: the source's; `dtype` is the dtype of the weights (optimizer states stay as
    they are), None: the source's; `arch` renames the architecture; `plain` leaves out the data
    loader's state, which holds classes of metaseq."""

    form: str = FLAT
    name: str = ""
    shards: int | None = None
    dtype: str | None = None
    arch: str | None = None
    plain: bool = False


def output(target: Checkpoint, options: Options) -> Output:
    """Plan the files. Raises RefusedError for a source that is not metaseq's, for a singleton of
    several parts, and for tensors that have no place in a flat parameter or are named by the
    metadata and missing."""
    if target.framework != "metaseq":
        raise RefusedError(
            f"{target.folder}: is {target.framework}'s, and only metaseq's own checkpoints can be "
            "written as metaseq's; --to alpa takes others"
        )
    if options.form == SINGLETON and target.layout.tp != 1:
        raise RefusedError(
            f"{target.folder}: a singleton has one part and not {target.layout.tp}; ask for tp 1"
        )
    if options.form == SINGLETON and target.with_optimizer:
        raise RefusedError(
            f"{target.folder}: a singleton has no flat parameters, which the optimizer's states "
            "are of; convert it --weights-only, or in another form"
        )
    files: list[WantedFile] = []
    for rank in target.rank_folders:
        part = _Part(target, rank[0], options)
        files += part.shard_files() if options.form == FLAT else part.whole_file()
    converted = [
        (target.rank_folders[file.place.tp, 0, 0], file.path)
        for file in files
        if file.tensors and file.place
    ]
    if twice := [path for path, times in Counter(file.path for file in files).items() if times > 1]:
        raise RefusedError(
            f"{twice[0]}: would be the name of several files; put {{i}}, {{part}} or {{shard}} "
            f"into it"
        )
    return Output(files, converted, [], {})


class _Part:
    """The files of one model-parallel part."""

    def __init__(self, target: Checkpoint, part: int, options: Options) -> None:
        self.target, self.part, self.options = target, part, options
        self.meta = target.rank_metadata[part, 0, 0]
        self.held: dict[str, dict[str, StoredTensor]] = {}
        for held in target.index.held:
            if held.found.place.tp == part:
                self.held.setdefault(held.found.state, {})[held.found.name] = held
        self.shards = options.shards or target.layout.dp
        self.optimizer = target.with_optimizer and bool(self.meta.get("last_optimizer_state"))
        self.metadata: dict[str, Any] = self.meta.get("shard_metadata") or (
            usual(self.held[MAIN_PARAM]) if options.form == FLAT else {}
        )
        self.modules = self.metadata.get("param_metadata", [])
        self.flats = [
            Flat(
                join(entry["fsdp_path"], flat),
                tuple(join(entry["fsdp_path"], name) for name in param["names"]),
                tuple(param["shapes"]),
            )
            for entry in self.modules
            for flat, param in entry["params"].items()
        ]
        if options.form == FLAT or self.optimizer:
            self._check_flats()

    # ---------------------------------------------------------------------------------------------------
    # whole tensors

    def whole_file(self) -> Iterator[WantedFile]:
        """One file with each tensor under its own name; the optimizer's states, if asked for, stay
        flat in one shard."""
        wanted: dict[TensorSpec, Wanted] = {}
        model: dict[str, object] = {}
        for name, held in sorted(
            self.held[MAIN_PARAM].items(), key=lambda item: self._is_buffer(item[0])
        ):
            dtype = held.found.stored.dtype
            for own, parts, shape in self._tensors(name, held):
                model[own] = self._want(own, shape, dtype, parts, wanted)
        model |= {other: model[name] for name, other in self._shared()}
        tree = {"model": model}
        if self.options.form == WHOLE and self.metadata:
            tree["shard_metadata"] = self._metadata_of(1, 0)
        if self.optimizer:
            tree["last_optimizer_state"] = self._optimizer(1, 0, wanted)
        yield self._file(self._path(0), {**tree, "args": None, **self._rest()}, wanted)

    def _tensors(
        self, name: str, held: StoredTensor
    ) -> Iterator[tuple[str, tuple[Shard, ...], tuple[int, ...]]]:
        """What a tensor is in the file: name, parts and shape; in a singleton k, v and q stand for
        themselves."""
        shape = held.found.stored.shape
        if self.options.form == SINGLETON and held.kind == KVQ:
            for own, part in zip(SPLIT, held.parts, strict=True):
                yield (
                    name.replace(FUSED, own),
                    in_a_row([part]),
                    (shape[0] // len(SPLIT), *shape[1:]),
                )
        else:
            yield name, held.parts, shape

    def _is_buffer(self, name: str) -> bool:
        return name in self.metadata.get("buffer_names", ())

    def _shared(self) -> Iterator[tuple[str, str]]:
        """(name, another name of the same parameter), but the head that a singleton does
        without."""
        pairs = [
            (join(entry["fsdp_path"], name), join(entry["fsdp_path"], other))
            for entry in self.modules
            for name, other in entry["shared_param_info"]
        ]
        if (
            any(flat.key == EMBEDDING for flat in self.flats)
            and metaseq.naming_of(self.target).tied
        ):
            pairs.append(
                (EMBEDDING, OUTPUT)
            )  # not flattened, it is saved by both names, and the metadata does not say so
        return (
            (name, other)
            for name, other in pairs
            if self.options.form != SINGLETON or other != OUTPUT
        )

    # ------------------------------------------------------------------------------------------------------
    # the shards

    def _check_flats(self) -> None:
        """Each tensor must be in one flat parameter, or a buffer."""
        times = Counter(name for flat in self.flats for name in flat.names)
        there, buffers = self.held[MAIN_PARAM].keys(), set(self.metadata.get("buffer_names", ()))
        for wrong, what in (
            (times.keys() - there, "are in its shard metadata and not in its files"),
            ({name for name in times if times[name] > 1}, "would be in several flat parameters"),
            (there - times.keys() - buffers, "are in no flat parameter of its shard metadata"),
        ):
            if wrong:
                raise RefusedError(
                    f"{self.target.folder}: part {self.part}: {len(wrong)} tensors {what}: "
                    f"{shorten_names(wrong)}"
                )

    def shard_files(self) -> Iterator[WantedFile]:
        buffers = [held for name, held in self.held[MAIN_PARAM].items() if self._is_buffer(name)]
        for shard in range(self.shards):
            wanted: dict[TensorSpec, Wanted] = {}
            model = {
                flat.key: self._slice(flat, MAIN_PARAM, self.shards, shard, wanted)
                for flat in self.flats
            }
            model |= {
                held.found.name: self._want(
                    held.found.name,
                    held.found.stored.shape,
                    held.found.stored.dtype,
                    held.parts,
                    wanted,
                )
                for held in buffers
            }
            model |= {other: model[name] for name, other in self._shared() if name in model}
            tree = {"model": model, "shard_metadata": self._metadata_of(self.shards, shard)}
            if self.optimizer:
                tree["last_optimizer_state"] = self._optimizer(self.shards, shard, wanted)
            path = self._path(shard)
            yield self._file(path, {**tree, **self._rest()}, wanted)
            yield from sidecar.files(
                self.target, self.part, shard, self.shards, PurePath(path), tree
            )

    def _slice(
        self, flat: Flat, state: str, shards: int, shard: int, wanted: dict[TensorSpec, Wanted]
    ) -> TensorSpec:
        """The shard's elements of a flat parameter, or of an optimizer state of it; shape
        [chunk]."""
        chunk, padding = flat.chunk(shards), flat.padding(shards, shard)
        low, high, position, parts = shard * chunk, (shard + 1) * chunk - padding, 0, []
        for held in (self.held[state][name] for name in flat.names):
            for part in held.parts:
                itemsize = part.view.itemsize
                parts += [
                    one.at("", (position - low) * itemsize)
                    for one in part.within(
                        (low - position) * itemsize, (high - position) * itemsize
                    )
                ]
            position += held.found.stored.numel
        if padding:
            parts.append(gap(1, padding).at("", (high - low) * ITEMSIZE["float32"]))
        dtype = self._dtype(flat, state)
        return self._want(flat.key, (chunk,), dtype, tuple(parts), wanted, state)

    def _dtype(self, flat: Flat, state: str) -> str:
        dtypes = sorted({self.held[state][name].found.stored.dtype for name in flat.names})
        if len(dtypes) > 1 and (state != MAIN_PARAM or self.options.dtype is None):
            raise RefusedError(
                f"{self.target.folder}: part {self.part}: {flat.key} would be "
                f"{' and '.join(dtypes)}; a flat "
                "parameter has one dtype: name it with --output-dtype"
            )
        return dtypes[0]

    def _metadata_of(self, shards: int, shard: int) -> dict[str, Any]:
        """The shard metadata that this shard has, of `shards`; only padding differs between
        shards."""
        padding = {flat.key: flat.padding(shards, shard) for flat in self.flats}
        entries = [
            {
                **entry,
                "params": {
                    name: {**param, "padding": padding[join(entry["fsdp_path"], name)]}
                    for name, param in entry["params"].items()
                },
                "shared_param_info": [tuple(pair) for pair in entry["shared_param_info"]],
            }
            for entry in self.modules
        ]
        return {**self.metadata, "param_metadata": entries}

    def _optimizer(
        self, shards: int, shard: int, wanted: dict[TensorSpec, Wanted]
    ) -> dict[str, Any]:
        """The optimizer's state dict: each flat parameter's states cut as it is, everything else as
        it was."""
        by_key, saved = {flat.key: flat for flat in self.flats}, self.meta["last_optimizer_state"]
        if lost := set(self.meta["optimizer_index"].values()) - by_key.keys():
            raise RefusedError(
                f"{self.target.folder}: part {self.part}: the optimizer has states of "
                f"{shorten_names(lost)}, which are no flat parameters of the output; leave the "
                "optimizer out with --skip-optimizer-state"
            )
        state = {}
        for number, states in saved["state"].items():
            flat = by_key[self.meta["optimizer_index"][number]]
            state[number] = {
                key: self._slice(flat, key, shards, shard, wanted)
                if key in _MOMENTS
                else self._small(key, value)
                for key, value in states.items()
            }
        return {**saved, "state": state}

    def _small(self, key: str, value: object) -> object:
        if isinstance(value, Stored) and value.numel > 1:
            raise RefusedError(
                f"{self.target.folder}: nobody knows how the optimizer state {key} "
                f"{list(value.shape)} is cut; leave the optimizer out with --skip-optimizer-state"
            )
        return value

    # -------------------------------------------------------------------------------------------------------
    # the files

    def _want(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        parts: tuple[Shard, ...],
        wanted: dict[TensorSpec, Wanted],
        state: str = MAIN_PARAM,
    ) -> TensorSpec:
        spec = TensorSpec(
            name if state == MAIN_PARAM else f"{state}.{name}",
            (state == MAIN_PARAM and self.options.dtype) or dtype,
            shape,
        )
        wanted[spec] = Wanted(spec, parts)
        return spec

    def _path(self, shard: int) -> str:
        name = self.options.name or NAMES[self.options.form]
        return name.format(part=self.part, shard=shard, updates=self.target.iteration or "last")

    def _file(
        self, path: str, tree: dict[str, Any], wanted: dict[TensorSpec, Wanted]
    ) -> WantedFile:
        frame = torch_zip.frame(tree, PurePath(path).name)
        return file_of_objects(path, frame, wanted, Place(self.part))

    def _rest(self) -> dict[str, Any]:
        """What a file holds beside the model and its optimizer."""
        rest = {key: value for key, value in self.meta.items() if key not in _OWN}
        if self.options.form == SINGLETON:
            rest["cfg"] = with_parts(rest.get("cfg"), 1)
        if self.options.arch:
            rest["cfg"] = _with_arch(rest.get("cfg"), self.options.arch)
        if self.options.plain and isinstance(rest.get("extra_state"), dict):
            rest["extra_state"] = {**rest["extra_state"], "train_iterator": None}
        return rest


def _with_arch(cfg: object, arch: str) -> object:
    """A configuration whose model is of another architecture (metaseq, dataclass/utils.py: `_name`
    of its group)."""
    if not isinstance(cfg, dict):
        return cfg
    model = cfg.get("model")
    if not isinstance(model, Opaque) or not isinstance(model.state, dict):
        return cfg
    state = {**model.state, "_name": arch, "arch": arch}
    return {
        **cfg,
        "model": Opaque(
            model.target, model.args, model.kwargs, model.new, state, model.items, model.pairs
        ),
    }
