"""A checkpoint as a mapping from canonical names to tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from parammap.api.state_dict import StateDict
from parammap.api.tensor import Tensor
from parammap.checkpoint.checkpoint import Checkpoint as Source
from parammap.checkpoint.training_state import TrainingState
from parammap.frameworks import registry
from parammap.plan.plan import Wanted
from parammap.plan.planner import FIRST, Planner
from parammap.tensors.layout import Layout
from parammap.tensors.logical import MAIN_PARAM, LogicalTensor, TensorSpec
from parammap.tensors.names import suggest
from parammap.tensors.shard import whole_of


def open(
    path: str | Path,
    *,
    iteration: int | None = None,
    sidecar: str | Path | None = None,
    metadata_from: str | Path | None = None,
    weights_only: bool = False,
    drop: Collection[str] = (),
) -> Checkpoint:
    """Open a checkpoint of any framework: a save folder, or one of its iterations. Only headers,
    metadata and sidecars are read.

    `iteration` None: the latest. `sidecar` is where param_map*.json or layout_*.json are, if not
    beside it; `metadata_from` are shards whose metadata describes metaseq files that lost it;
    `weights_only` leaves the optimizer's state out, `drop` {"experts"} the experts. Raises
    RefusedError if it is no checkpoint, incomplete or damaged."""
    return Checkpoint(
        registry.read(
            Path(path),
            iteration=iteration,
            sidecar=Path(sidecar) if sidecar else None,
            metadata_from=Path(metadata_from) if metadata_from else None,
            weights_only=weights_only,
            drop=frozenset(drop),
        )
    )


def source_of(checkpoint: str | Path | Checkpoint) -> Source:
    """What the reader made of a checkpoint, which is opened first if it is a path."""
    return (checkpoint if isinstance(checkpoint, Checkpoint) else open(checkpoint))._source


class Checkpoint(Mapping[str, Tensor]):
    """The weights of a checkpoint by canonical name ("layers.0.attention.q.weight"), in global
    numbers of layers and experts, whole, whatever ranks they are cut over.

    A weight is the one that the optimizer steps; a checkpoint without an optimizer has the model's.
    Fused tensors stand apart: q, k and v of attention, gate and up of a gated MLP. Rows that pad a
    vocabulary are a tensor of their own, "embedding.word.weight.padding"."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._planner = Planner(source.index, replicas=FIRST)
        self._tensors = {(one.state, one.name): one for one in source.index.shards}

    @property
    def framework(self) -> str:
        """The framework that saved it, by the name that `parammap formats` has."""
        return self._source.framework

    @property
    def folder(self) -> Path:
        return self._source.folder

    @property
    def iteration(self) -> int:
        return self._source.iteration

    @property
    def layout(self) -> Layout:
        """The sizes of the parallel groups of the run that saved it."""
        return self._source.trained or self._source.layout

    @property
    def training_state(self) -> TrainingState:
        """How far the run has come and how its optimizer steps: iteration, steps, parameter groups,
        schedule, samples and tokens, loss scale, random states. None where it is not recorded."""
        return self._source.training_state

    @property
    def num_layers(self) -> int:
        return self._source.num_layers

    @property
    def states(self) -> tuple[str, ...]:
        """What it holds of its parameters: "weight", "exp_avg", "exp_avg_sq", and "model_weight",
        the copy that the model computes with."""
        return tuple(dict.fromkeys(state for state, _ in self._tensors))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how it was read, and what of it was left out."""
        return tuple(self._source.notes + self._source.dropped)

    def tensors(self, state: str | None = None) -> Iterator[Tensor]:
        """All tensors, or those of one state, in the order of the files."""
        return (self._tensor(one) for one in self._tensors.values() if state in (None, one.state))

    def tensor(self, name: str, state: str = MAIN_PARAM) -> Tensor:
        """A parameter's weight, or another state of it. Raises KeyError, with the closest names."""
        if state not in self.states:
            raise KeyError(f"{self.folder}: holds no {state}, only {', '.join(self.states)}")
        if (state, name) not in self._tensors:
            known = [one for its, one in self._tensors if its == state]
            raise KeyError(f"{self.folder}: holds no {state} of {name}{suggest(name, known)}")
        return self._tensor(self._tensors[state, name])

    def state_dict(self, dialect: str, *, state: str = MAIN_PARAM, **options: object) -> StateDict:
        """The weights by the names, and in the fusions and orientations, of another framework's
        model, whole; or another state of them, in the same shapes.

        `dialect` is one of "transformers", "megatron", "mindspore", "metaseq", "merak" and "alpa";
        `options` are those of `parammap convert --to` that framework, such as dtype="float16".
        Raises RefusedError where convert would: for a model that the framework does not have."""
        return StateDict(self._source, self._planner, dialect, state, options)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return (name for state, name in self._tensors if state == MAIN_PARAM)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return (MAIN_PARAM, name) in self._tensors

    def __repr__(self) -> str:
        return f"<Checkpoint {self.folder}: {self.framework}, iteration {self.iteration}, {self.layout}>"

    def _tensor(self, tensor: LogicalTensor) -> Tensor:
        spec = TensorSpec(tensor.name, tensor.dtype, tensor.shape)
        return Tensor(Wanted(spec, (whole_of(tensor),)), tensor.state, self._planner)
