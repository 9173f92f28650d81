"""Writing Merak's checkpoints of GPT-2: a file for each tensor- and pipeline-parallel rank, its
configuration, a tracker.

Every stage holds the modules that its cut list gives it, the head with the last norm, also where it
is the word embedding: so the runtime's own state dict has them, and so it loads them, strictly. A
vocabulary that is cut over ranks is padded as Merak's tools pad it, with copies of its last row.
The optimizer stays behind: the runtime resumes with --finetune or --no_load_optim, as it always
does from a release.

Sources: Merak d72efe5 (Merak/utils/checkpoint.py, load_checkpoint;
tools/convert_merak_gpt2_checkpoint.py, merak_shard, _vocab_size_with_padding) and v2.2.2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

from parammap import families
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.trackers import RELEASE
from parammap.errors import RefusedError
from parammap.families import GPT2, HEAD, MERAK, MERAK_CUT, WORD_EMBEDDING, Architecture
from parammap.formats import torch_legacy, torch_zip
from parammap.formats.frames import Literal
from parammap.formats.pickles import Global, Opaque
from parammap.frameworks.architecture import architecture_of, check_family
from parammap.frameworks.merak.architecture import CONFIG, completed
from parammap.frameworks.merak.files import PART_FILE, TRACKER, WHOLE_FILE
from parammap.frameworks.merak.partition import UNIFORM, cuts, module_of
from parammap.plan.plan import Output, Wanted, WantedFile, file_of_objects
from parammap.plan.source_tensors import Parameter, SourceTensors
from parammap.tensors.arrangement import VOCAB, Sizes
from parammap.tensors.layout import Place
from parammap.tensors.logical import MAIN_PARAM
from parammap.tensors.names import shorten_names

ITERATION, ALL_DP, PLAIN = "iter", "all_dp", "plain"
FOLDERS, SCHEMES = (RELEASE, ITERATION), (ALL_DP, PLAIN)
FORMATS = {"zip": torch_zip.FORMAT, "legacy": torch_legacy.FORMAT}
#: the tools pad to a multiple of this times tp
_DIVISOR = 128
_SAMPLES = ("consumed_train_samples", "consumed_valid_samples")


@dataclass(frozen=True, slots=True)
class Options:
    """`tp` and `pp` are the layout (None: the source's); `custom_partition` is the cut list of the
    method `custom`.

    `folder` is `release` or `iter`; `scheme` where the one file of tp 1 · pp 1 goes: ALL_DP (up to
    v2.2.1) or PLAIN. `parallel_vocab` cuts the vocabulary over ranks, as a run with
    --parallel_vocab has it; else each has all of it. `for_release` zeroes the counters of consumed
    samples. `config` is a config.json that says what the source does not."""

    tp: int | None = None
    pp: int | None = None
    partition_method: str = UNIFORM
    custom_partition: tuple[int, ...] = ()
    folder: str = RELEASE
    scheme: str = ALL_DP
    serialization: str = "zip"
    parallel_vocab: bool = True
    for_release: bool = False
    config: Path | None = None
    activation: str | None = None
    dtype: str | None = None


def output(target: Checkpoint, options: Options = Options()) -> Output:
    """Plan the folder. Raises RefusedError for a model that is no GPT-2, for one of which heads,
    activation or eps are not known, for degrees that do not divide it, and for stages that would be
    empty."""
    own = architecture_of(target, options.activation)
    check_family(target, own.family, (GPT2,), "Merak")
    writer = _StageWriter(target, completed(own, options.config), options)
    return Output(
        list(writer.files()),
        [(folder, "") for folder in target.rank_folders.values()],
        [],
        {
            "merak": {
                "tp": writer.tp,
                "pp": writer.pp,
                "cuts": list(writer.cuts),
                "vocab_rows": writer.states.vocab_rows,
                "parallel_vocab": options.parallel_vocab,
            }
        },
        states=(MAIN_PARAM,),
    )


@dataclass(slots=True)
class _StageWriter:
    target: Checkpoint
    model: Architecture
    options: Options
    tp: int = field(init=False)
    pp: int = field(init=False)
    cuts: tuple[int, ...] = field(init=False)
    states: SourceTensors = field(init=False)
    parameters: list[Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.tp = self.options.tp or self.target.layout.tp
        self.pp = self.options.pp or self.target.layout.pp
        self._check()
        self.cuts = cuts(
            self.options.partition_method,
            self.target.num_layers,
            self.pp,
            self.options.custom_partition,
        )
        self.states = SourceTensors(self.target)
        if self.options.parallel_vocab:
            self.states = SourceTensors(self.target, padded_rows(self.states.vocab_rows, self.tp))
        self.parameters = list(self.states.parameters(MERAK if self.tp == 1 else MERAK_CUT))
        self._check_whole()

    def _check(self) -> None:
        model, folder = self.model, self.target.folder
        if unknown := [
            name for name in ("heads", "activation", "eps") if getattr(model, name) is None
        ]:
            raise RefusedError(
                f"{folder}: does not record its {', '.join(unknown)}; give a config.json of the "
                f"model with "
                "--config"
            )
        if model.groups not in (None, model.heads):
            raise RefusedError(
                f"{folder}: has {model.groups} heads of keys and {model.heads} of queries, and "
                f"Merak's GPT-2 "
                "as many of each; the two models are of different architectures"
            )
        for what, count in (("attention heads", model.heads), ("columns of the MLP", model.ffn)):
            if count is not None and count % self.tp:
                raise RefusedError(
                    f"{folder}: --tp {self.tp} does not divide its {count} {what}; choose a tp "
                    f"that does"
                )
        if self.options.folder == ITERATION and not self.target.iteration:
            raise RefusedError(
                f"{folder}: has no iteration, and Merak reads iter_0000000 as none; leave --folder "
                f"iter out"
            )

    def _check_whole(self) -> None:
        """Refuse a source that lacks what every GPT-2 has."""
        rows = families.rows_of(MERAK)
        expected = {
            name.format(i=i) for name in rows if name != HEAD for i in range(self.target.num_layers)
        }
        if missing := sorted(expected - {parameter.canonical for parameter in self.parameters}):
            raise RefusedError(
                f"{self.target.folder}: lacks {len(missing)} tensors of Merak's GPT-2: "
                f"{shorten_names(missing)}; the "
                "two models are of different architectures"
            )

    def files(self) -> Iterator[WantedFile]:
        folder = self._folder()
        for pp, (low, high) in enumerate(pairwise(self.cuts)):
            stage = [one for one in self._stored() if low <= self._module(one[0]) < high]
            for tp in range(self.tp):
                yield self._file(f"{folder}/{self._rank_file(tp, pp)}", stage, Place(tp, pp))
        yield WantedFile(f"{folder}/{CONFIG}", (Literal(self._config()),), ())
        tracked = RELEASE if self.options.folder == RELEASE else str(self.target.iteration)
        yield WantedFile(TRACKER, (Literal(tracked.encode()),), (), completes=True)

    def _stored(self) -> Iterator[tuple[str, str, Parameter]]:
        """What is written: canonical name, name, and the parameter of the source that it is; a tied
        head is the words."""
        by_name = {parameter.canonical: parameter for parameter in self.parameters}
        for canonical, parameter in by_name.items():
            yield canonical, parameter.name, parameter
        if HEAD not in by_name:
            name, _ = families.rows_of(MERAK)[HEAD]
            yield HEAD, name, by_name[WORD_EMBEDDING]

    def _module(self, canonical: str) -> int:
        return module_of(canonical, self.target.num_layers)

    def _file(self, path: str, stage: list[tuple[str, str, Parameter]], place: Place) -> WantedFile:
        wanted = [self._wanted(*one, place) for one in stage]
        tree = {
            "model": {one.spec.name: one.spec for one in wanted},
            "checkpoint_version": 3.0,
            "iteration": self.target.iteration,
            **self._args(),
        }
        frame = FORMATS[self.options.serialization].frame_tree(tree, PurePath(path).name)
        return file_of_objects(path, frame, {one.spec: one for one in wanted}, place)

    def _wanted(self, canonical: str, name: str, parameter: Parameter, place: Place) -> Wanted:
        prefix = f"module.{self._module(canonical)}." + (
            "" if canonical == HEAD else "transformer."
        )
        is_whole = parameter.kind == VOCAB and not self.options.parallel_vocab
        tp, rank = (1, 0) if is_whole else (self.tp, place.tp)
        return self.states.wanted(
            parameter,
            MAIN_PARAM,
            Sizes(self.model.heads, self.model.heads),
            dtype=self.options.dtype,
            tp=tp,
            rank=rank,
            name=prefix + name,
        )

    def _args(self) -> dict[str, Any]:
        """The arguments saved with the source; those of another framework only as far as Merak can
        load them without it."""
        args = self.target.common_metadata.get("args")
        if not isinstance(args, Opaque) or not isinstance(args.state, dict):
            return {}
        zeros = {name: 0 for name in _SAMPLES if self.options.for_release and name in args.state}
        state = {**args.state, **zeros}
        if self.target.framework != "merak":
            state = {name: value for name, value in state.items() if _is_plain(value)}
        return {"args": replace(args, state=state)}

    def _folder(self) -> str:
        number = f"iter_{0 if self.options.folder == RELEASE else self.target.iteration:07d}"
        if self.tp == self.pp == 1 and self.options.scheme == ALL_DP:
            return f"{number}_all_dp"
        return RELEASE if self.options.folder == RELEASE else number

    def _rank_file(self, tp: int, pp: int) -> str:
        if self.tp == self.pp == 1:
            return WHOLE_FILE
        return f"mp_rank_{tp:02d}{f'_pp_rank_{pp:03d}' if self.pp > 1 else ''}/{PART_FILE}"

    def _config(self) -> bytes:
        """The source's own config.json if it is a GPT-2's, else one of what is known, with the rows
        of the table as its vocabulary: so the model must be built. `orig_vocab_size` is how many of
        them are true."""
        model, rows = self.model, self.states.vocab_rows
        true = self.states.tensor(MAIN_PARAM, WORD_EMBEDDING).rows
        known = {
            "model_type": GPT2,
            "n_layer": model.layers,
            "n_embd": model.hidden,
            "n_head": model.heads,
            "n_inner": model.ffn,
            "n_positions": model.positions,
            "activation_function": model.activation,
            "layer_norm_epsilon": model.eps,
        }
        own = model.config if model.config.get("model_type", GPT2) == GPT2 else {}
        config = {
            **own,
            **{name: value for name, value in known.items() if own.get(name) is None},
            "vocab_size": rows,
            "tie_word_embeddings": (MAIN_PARAM, HEAD) not in self.states.tensors,
        }
        config.pop("orig_vocab_size", None)
        return json.dumps(
            {**config, **({"orig_vocab_size": true} if rows > true else {})}, indent=1
        ).encode()


def _is_plain(value: object) -> bool:
    """Whether a value is of Python's own types, or torch's."""
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, Global):
        return value.module == "torch"
    return isinstance(value, (str, bytes, int, float, complex, type(None)))


def padded_rows(vocab: int, tp: int) -> int:
    """The rows of a vocabulary that is cut over tp ranks: its own if tp divides it."""
    multiple = _DIVISOR * tp
    return vocab if vocab % tp == 0 else -(-vocab // multiple) * multiple
