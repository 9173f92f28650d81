"""The training state that is no tensor: how far a run has come and how its optimizer steps, in the
form of no framework.

Readers fill it, one for each rank that has metadata of its own, and writers of other frameworks
take it. A writer of the same framework copies the rank's metadata as it is, since a framework keeps
more than this. None stands for what is not recorded everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Number = bool | int | float


def as_number(value: object) -> Number | None:
    return value if isinstance(value, (bool, int, float)) else None


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters that the optimizer steps alike. `values` is all that the framework keeps of the
    group but the parameters, by torch.optim's names and in the order in which it was saved; the
    properties are what every Adam has."""

    values: Mapping[str, Any]

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> ParamGroup:
        """A group of torch.optim's state dict."""
        return cls({key: value for key, value in saved.items() if key != "params"})

    @property
    def lr(self) -> Number | None:
        """The learning rate of the last step."""
        return as_number(self.values.get("lr"))

    @property
    def betas(self) -> tuple[float, float] | None:
        """The decays of the first and the second moment, per step."""
        betas = self.values.get("betas")
        return tuple(betas) if isinstance(betas, (list, tuple)) else None

    @property
    def eps(self) -> Number | None:
        """What is added to the root of the second moment."""
        return as_number(self.values.get("eps"))

    @property
    def weight_decay(self) -> Number | None:
        """The factor of weight decay of this very group: 0 for parameters that do not decay."""
        return as_number(self.values.get("weight_decay"))

    @property
    def bias_correction(self) -> bool | None:
        """Whether Adam corrects its moments for their start at zero."""
        return self.values.get("bias_correction")

    @property
    def step(self) -> Number | None:
        """How many times the optimizer has stepped these parameters."""
        return as_number(self.values.get("step"))


@dataclass(frozen=True, slots=True)
class Schedule:
    """The schedule of learning rate and weight decay. `values` is all of it, by the names of
    Megatron-LM's OptimizerParamScheduler (core_r0.6.0 … main) and in the order in which it was
    saved. Its steps are samples, as that scheduler counts them: `lr_warmup_steps`,
    `lr_decay_steps`, `wd_incr_steps` and, passed so far, `num_steps`."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """What a rank, or all of a run's ranks together, keep of it.

    `iteration`: iterations of the training loop, those included whose gradients overflowed.
    `steps`: how many times the optimizer has stepped, in ascending order: several numbers where
    parameters differ, () where it is not recorded.
    `groups`: the optimizer's parameter groups, those of a chain of optimizers one after the other.
    `schedule`: None also for a scheduler of another kind than Megatron-LM's.
    `consumed_samples`, `consumed_valid_samples`: sequences trained on and validated on so far.
    `consumed_tokens`: tokens trained on so far, as recorded or by the samples. `sequence_length`: tokens of a sample.
    `weight_decay`: the run's, from which groups may differ.
    `compute_dtype`: the dtype that the model computes in (float32, float16, bfloat16).
    `loss_scale`: the factor of the loss, of a run in float16.
    `optimizer`: the name of the optimizer's class.
    `random_state`: the rank's random states, in the form of its framework, which alone can use
    them."""

    iteration: int | None = None
    steps: tuple[Number, ...] = ()
    groups: tuple[ParamGroup, ...] = ()
    schedule: Schedule | None = None
    consumed_samples: int | None = None
    consumed_valid_samples: int | None = None
    consumed_tokens: int | None = None
    sequence_length: int | None = None
    weight_decay: float | None = None
    compute_dtype: str | None = None
    loss_scale: float | None = None
    optimizer: str | None = None
    random_state: object = field(default=None, repr=False)


def steps_of(groups: Iterable[ParamGroup]) -> tuple[Number, ...]:
    """The steps that the groups have taken, each number once."""
    return tuple(sorted({group.step for group in groups if group.step is not None}))


def together(states: Iterable[TrainingState]) -> TrainingState:
    """What the ranks of a run say together: the first one's, with the steps and the groups of all,
    each group once, as ranks have other groups where they have parameters of other kinds."""
    states = list(states)
    if not states:
        return TrainingState()
    groups: list[ParamGroup] = []
    for state in states:
        groups += [group for group in state.groups if group not in groups]
    steps = sorted({step for state in states for step in state.steps})
    return replace(states[0], groups=tuple(groups), steps=tuple(steps))
