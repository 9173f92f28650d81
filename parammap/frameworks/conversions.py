"""Which framework's checkpoints can be written for which other one, for each family of models.

The table is made of what readers (SOURCES) and targets (TARGETS) have; tests convert along every
pair of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from parammap.checkpoint.architecture import BLOOM, GPT2, LLAMA, MIXTURE, OPT, YUAN
from parammap.frameworks.targets import TARGETS

#: what goes along: the optimizer's states as well, or the weights alone
WHOLE, WEIGHTS = "whole state", "weights"
TITLES = {
    GPT2: "GPT-2 (learned positions, GELU)",
    LLAMA: "LLaMA-like (rotary positions, RMS norms, gated)",
    MIXTURE: "Mixtures of experts",
    OPT: "OPT",
    BLOOM: "BLOOM",
    YUAN: "Yuan-2.0",
}


@dataclass(frozen=True, slots=True)
class Source:
    """What a framework's reader reads: the families of models, and whether with the optimizer's
    states."""

    families: tuple[str, ...]
    optimizer: bool = True


SOURCES = {
    "megatron": Source((GPT2, LLAMA, MIXTURE, YUAN)),
    "megatron-dist": Source((GPT2, LLAMA, MIXTURE)),
    "mindspore": Source((GPT2, LLAMA, MIXTURE)),
    "deepspeed": Source((GPT2, BLOOM)),
    "merak": Source((GPT2,), optimizer=False),
    "metaseq": Source((OPT,)),
    "alpa": Source((OPT, BLOOM), optimizer=False),
    "transformers": Source((GPT2, LLAMA, OPT, BLOOM), optimizer=False),
}


def goes(family: str, source: str, to: str) -> str | None:
    """What of a model of a family goes from one framework to another: WHOLE, WEIGHTS, or None for
    nothing."""
    reader, target = SOURCES[source], TARGETS[to]
    if family not in reader.families or family not in target.families:
        return None
    is_native = source in target.native
    if (
        target.needs_optimizer
        and not reader.optimizer
        or (target.native and not is_native and not target.import_model)
    ):
        return None
    return WHOLE if reader.optimizer and target.optimizer else WEIGHTS


def pairs() -> Iterator[tuple[str, str, str]]:
    """(family, source, target) of all that works."""
    return (
        (family, source, to)
        for family in TITLES
        for source in SOURCES
        for to in TARGETS
        if goes(family, source, to)
    )


def tables() -> str:
    """A table in Markdown for each family: sources down, targets across."""
    return "\n\n".join(f"### {title}\n\n{_table(family)}" for family, title in TITLES.items())


def _table(family: str) -> str:
    sources = [source for source in SOURCES if family in SOURCES[source].families]
    targets = [to for to in TARGETS if family in TARGETS[to].families]
    rows = [
        ["from \\ to", *targets],
        ["---"] * (len(targets) + 1),
        *([source, *(goes(family, source, to) or "–" for to in targets)] for source in sources),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
