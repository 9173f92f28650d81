"""A model's state dict as another framework has it, read tensor by tensor from wherever it lies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import PurePath
from typing import Any

from parammap.api.tensor import Tensor
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import is_padding
from parammap.errors import RefusedError
from parammap.execute.read import read
from parammap.formats.frames import Literal
from parammap.frameworks import registry
from parammap.frameworks.options import options_of
from parammap.plan.plan import Output, Wanted
from parammap.plan.planner import Planner
from parammap.tensors.layout import SIZES, Place
from parammap.tensors.logical import MAIN_PARAM
from parammap.tensors.names import shorten_names, suggest

_CONFIG = "config.json"


class StateDict(Mapping[str, Tensor]):
    """The tensors of a model by the names that a framework's state dict has, with the head that is
    the word embedding under both its names. Nothing is read before a tensor is asked for it."""

    def __init__(
        self,
        source: Checkpoint,
        planner: Planner,
        dialect: str,
        state: str,
        options: Mapping[str, object],
    ) -> None:
        self.dialect, self.state = dialect, state
        self._planner, self._output = planner, _files(source, dialect, options)
        weights = {
            wanted.spec.name: wanted
            for file in self._output.files
            for wanted in file.tensors
            if {part.tensor.state for part in wanted.parts if part.tensor} == {MAIN_PARAM}
        }
        for name, other in self._output.aliases.items():
            same = weights[other]
            weights[name] = replace(same, spec=replace(same.spec, name=name))
        if state != MAIN_PARAM:
            weights = _in_state(weights, source, state, options.get("dtype"))
        self._tensors = {name: Tensor(one, state, planner) for name, one in weights.items()}
        if not self._tensors:
            raise RefusedError(f"{source.folder}: holds no {state} of its weights")

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The config.json that the framework keeps beside such weights; None if it keeps none."""
        for file in self._output.files:
            if PurePath(file.path).name == _CONFIG:
                copied = [read(one.spec, self._planner.fills(one, Place())) for one in file.tensors]
                texts = [one.tobytes() for one in copied] or [
                    segment.data for segment in file.segments if isinstance(segment, Literal)
                ]
                config: dict[str, Any] = json.loads(b"".join(texts))
                return config
        return None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise KeyError(f"{name}: is no tensor of {self}{suggest(name, self._tensors)}")
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        return f"<StateDict {self.dialect} ({self.state}): {len(self)} tensors>"


def _files(source: Checkpoint, dialect: str, given: Mapping[str, object]) -> Output:
    """The files of a model's weights as one rank of a framework would hold them. Raises
    RefusedError where a conversion would."""
    whole = {name: one.state_dict for name, one in registry.targets().items()}
    if (own := whole.get(dialect)) is None:
        known = ", ".join(name for name, options in whole.items() if options is not None)
        raise RefusedError(f"{dialect}: is no dialect of state dicts; choose one of {known}")
    target = registry.target(dialect)
    options = options_of(dialect, {**own, **given}, weights_only=True)
    sizes = dict.fromkeys(SIZES if target.resharded else target.sizes, 1)
    weights = replace(source, with_optimizer=False)
    return target.files(target.wanted(weights, options, sizes, (), None), options, sizes)


def _in_state(
    weights: Mapping[str, Wanted], source: Checkpoint, state: str, dtype: object
) -> dict[str, Wanted]:
    """The same parameters in another state, in its dtype on disk if none is asked for; buffers,
    which no optimizer steps, are left out."""
    known = {one.name: one for one in source.index.tensors(state)}
    found = {}
    for name, wanted in weights.items():
        names = {part.tensor.name for part in wanted.parts if part.tensor} - {
            part.tensor.name for part in wanted.parts if part.tensor and is_padding(part.tensor)
        }
        if not names & known.keys():
            continue
        if lacking := names - known.keys():
            raise RefusedError(f"{source.folder}: holds no {state} of {shorten_names(lacking)}")
        own = known[min(names)].dtype
        parts = [
            replace(part, tensor=part.tensor and replace(part.tensor, state=state, dtype=own))
            for part in wanted.parts
        ]
        spec = replace(wanted.spec, dtype=str(dtype) if dtype else own)
        found[name] = replace(wanted, spec=spec, parts=tuple(parts))
    return found
