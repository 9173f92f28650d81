"""Writing a transformers folder, as save_pretrained of the library does: from_pretrained loads it
with no key left over.

A tied head is left out of safetensors, and in pytorch_model.bin it shares the word embedding's
storage. config.json is the source's own wherever it has one, changed only in what the conversion
changes; tokenizer and generation settings of a transformers source come along as they are.

Source: transformers 4.57 (modeling_utils.py, save_pretrained; configuration_utils.py),
huggingface_hub 0.36."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from parammap import families
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.families import HEAD, WORD_EMBEDDING, Architecture, rows_of, with_dialect
from parammap.formats.format import TreeFormat
from parammap.formats.frames import Frame, FrameBuilder, Literal
from parammap.frameworks.architecture import architecture_of, check_family
from parammap.frameworks.transformers.files import (
    BIN,
    FORMATS,
    SAFETENSORS,
    index_name,
    shard_name,
    shards,
)
from parammap.frameworks.transformers.model import CONFIG, ModelConfig, completed, load, written
from parammap.plan.plan import Output, Wanted, WantedFile, file_of_objects
from parammap.plan.source_tensors import Parameter, SourceTensors
from parammap.tensors.arrangement import Sizes
from parammap.tensors.logical import MAIN_PARAM, Extent, Stored, TensorSpec
from parammap.tensors.names import shorten_names

#: the library's default of max_shard_size
MAX_SHARD_NBYTES = 5 * 10**9
#: what else a folder may hold that goes with the model whatever its weights' layout
_ALONG = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
#: where a configuration says the dtype; releases from 4.56 on know both
_DTYPE_SETTINGS = ("torch_dtype", "dtype")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, slots=True)
class Options:
    """`format` is that of the weights' files, of at most `max_shard_size` bytes each; `dtype` is
    their dtype (None: as on disk); `activation` and `config`, a config.json, say what the source
    does not record."""

    dtype: str | None = None
    format: str = SAFETENSORS
    max_shard_size: int = MAX_SHARD_NBYTES
    activation: str | None = None
    config: Path | None = None


def shard_size(text: str) -> int:
    """Bytes as the library's max_shard_size has them: 5GB, 200MB, 1000; for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B|)", text.strip().upper())
    if not match or not (nbytes := int(float(match[1]) * _UNITS[match[2]])):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB, 200MB or 1000")
    return nbytes


def output(target: Checkpoint, options: Options = Options()) -> Output:
    """Plan the folder. Raises RefusedError for a model that transformers' families do not compute,
    or that lacks tensors."""
    own = architecture_of(target, options.activation)
    check_family(target, own.family, with_dialect("transformers"), "transformers")
    buffers = families.FAMILIES[own.family].buffers
    states = SourceTensors(target)
    if own.heads is None and any(".attention.qkv." in name for name in states.names()):
        raise RefusedError(
            f"{target.folder}: does not record its number of attention heads, by which queries, "
            f"keys and "
            "values are told apart; convert a checkpoint that has its arguments or layout files"
        )
    own = completed(own, load(options.config)) if options.config else own
    parameters = list(states.parameters(own.family, buffers))
    model = _model(target, replace(own, vocab=states.vocab_rows), states, options)
    _check(target, model, parameters)
    tensors = {
        one.canonical: states.wanted(
            one,
            MAIN_PARAM,
            Sizes(own.heads, own.groups),
            dtype=options.dtype,
            name=one.name if one.canonical == HEAD else model.prefix + one.name,
        )
        for one in parameters
    }
    head = rows_of(model.family)[HEAD][0]
    is_tied = HEAD not in tensors and not model.is_base
    aliases = {head: tensors[WORD_EMBEDDING].spec.name} if is_tied else {}
    return Output(
        [*_weights(list(tensors.values()), aliases, options), *_along(target, model)],
        [(folder, "") for folder in target.rank_folders.values()],
        [],
        {"transformers": {"model_type": model.config.get("model_type"), "format": options.format}},
        states=(MAIN_PARAM,),
        ignorable=buffers,
        aliases=aliases,
    )


def _model(
    target: Checkpoint, own: Architecture, states: SourceTensors, options: Options
) -> ModelConfig:
    """The source's configuration with what the conversion changes, or a new one."""
    words = states.tensor(MAIN_PARAM, WORD_EMBEDDING)
    if not own.config:
        return written(
            own, states.names(), words.cols, options.dtype or words.dtype, str(target.folder)
        )
    config = dict(own.config)
    if options.dtype:
        config |= dict.fromkeys(
            [name for name in _DTYPE_SETTINGS if name in config] or _DTYPE_SETTINGS[:1],
            options.dtype,
        )
    if config.get("vocab_size") != states.vocab_rows:
        config["vocab_size"] = states.vocab_rows
    return ModelConfig(str(target.folder), config)


def _check(target: Checkpoint, model: ModelConfig, parameters: list[Parameter]) -> None:
    """Refuse a source whose tensors are not just those of the model."""
    expected = {one.canonical: one.shape for one in model.tensors()}
    there = {one.canonical: one.shape for one in parameters}
    for names, what in (
        (expected.keys() - there.keys(), "lacks"),
        (there.keys() - expected.keys(), "has"),
    ):
        if names:
            rest = "of" if what == "lacks" else "that have no place in"
            raise RefusedError(
                f"{target.folder}: {what} {len(names)} tensors {rest} transformers' "
                f"{_class_of(model)}: "
                f"{shorten_names(sorted(names))}; the two models are of different architectures"
            )
    for canonical, shape in there.items():
        if shape != expected[canonical]:
            raise RefusedError(
                f"{target.folder}: {canonical} is {list(shape)}, and in transformers' "
                f"{_class_of(model)} of these sizes {list(expected[canonical])}; the two models "
                "are of different architectures"
            )


def _class_of(model: ModelConfig) -> str:
    return model.type.base if model.is_base else model.type.causal


def _weights(
    tensors: list[Wanted], aliases: dict[str, str], options: Options
) -> Iterator[WantedFile]:
    """The files of weights, aliases in pickles alone, and, if there are several, their index."""
    wanted = {one.spec: one for one in tensors}
    files = {}
    for number, specs in enumerate(parts := shards([*wanted], options.max_shard_size)):
        tree = {spec.name: spec for spec in specs}
        if options.format == BIN:
            tree |= {name: tree[other] for name, other in aliases.items() if other in tree}
        files[shard_name(options.format, number, len(parts))] = tree
    for path, tree in files.items():
        yield _file(path, tree, wanted, options.format)
    if len(files) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(spec.shape) for spec in wanted),
                "total_size": sum(spec.nbytes for spec in wanted),
            },
            "weight_map": {name: path for path, tree in files.items() for name in tree},
        }
        yield _json(index_name(options.format), index, sort_keys=True)


def _file(
    path: str, tree: dict[str, TensorSpec], wanted: dict[TensorSpec, Wanted], kind: str
) -> WantedFile:
    form, specs = FORMATS[kind], list(tree.values())
    if isinstance(form, TreeFormat):
        frame = form.frame_tree(tree, path)
    else:
        frame = Frame(form.frame(specs, metadata={"format": "pt"}), [*specs])
    return file_of_objects(path, frame, wanted)


def _along(target: Checkpoint, model: ModelConfig) -> Iterator[WantedFile]:
    """config.json, and what goes with the model of a transformers source."""
    is_own = target.framework == "transformers"
    if is_own and model.config == target.common_metadata["config"]:
        yield _copied(target, CONFIG)
    else:
        yield _json(CONFIG, model.config)
    for name in _ALONG:
        if is_own and (target.folder / name).is_file():
            yield _copied(target, name)


def _copied(target: Checkpoint, name: str) -> WantedFile:
    """A file byte by byte."""
    path = target.folder / name
    nbytes = path.stat().st_size
    stored = Stored("uint8", (nbytes,), (Extent(str(path), 0, nbytes),) if nbytes else ())
    builder = FrameBuilder()
    spec = TensorSpec(name, "uint8", (nbytes,))
    builder.content(0, spec, 0, nbytes)
    return WantedFile(name, tuple(builder.segments()), (Wanted(spec, source=stored),))


def _json(path: str, content: object, sort_keys: bool = False) -> WantedFile:
    return WantedFile(
        path, (Literal((json.dumps(content, indent=2, sort_keys=sort_keys) + "\n").encode()),), ()
    )
