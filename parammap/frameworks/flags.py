"""Flags of `parammap convert` that only some targets have, and those that several of them share."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parammap.errors import RefusedError


@dataclass(frozen=True, slots=True)
class Flag:
    """`facts` is what argparse is told beside the help. The flag sets the field of the target's
    options that has its name (`max_shard_size` for --max-shard-size) or is argparse's `dest`; left
    out, the field keeps its default."""

    name: str
    help: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keyword(self) -> str:
        """Its name as an argument of a function."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def option(self) -> str:
        return str(self.facts.get("dest") or self.keyword)

    def parse(self, value: object) -> Any:
        """What a program gives, as argparse makes it of text: None stays None, a switch is True or
        False, a list is written with commas. Raises RefusedError for what argparse refuses."""
        if value is None:
            return None
        if "const" in self.facts:
            if isinstance(value, bool):
                return self.facts["const"] if value else None
            raise RefusedError(f"{self.name}: is True or False and not {value!r}")
        text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        try:
            parsed = self.facts.get("type", str)(text)
        except (ArgumentTypeError, ValueError) as error:
            raise RefusedError(f"{self.name} {text}: {error}") from error
        choices = self.facts.get("choices")
        if choices and parsed not in choices:
            raise RefusedError(f"{self.name} {text}: choose one of {', '.join(choices)}")
        return parsed


def positive(text: str) -> int:
    """A flag's `type`: a number from 1 on."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"{value} is not 1 or more")
    return value


def numbers(text: str) -> tuple[int, ...]:
    """A flag's `type`: N,N,…"""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is no list of numbers N,N,…") from error


def switch(name: str, help: str, *, sets: bool = True, **facts: Any) -> Flag:
    """A flag without an argument."""
    return Flag(name, help, {"action": "store_const", "const": sets, **facts})


DTYPE = Flag(
    "--dtype",
    "cast the weights (default: as on disk; float16 for alpa; MindSpore: float32, with "
    "--weights-only)",
    {"choices": ["float32", "float16", "bfloat16"]},
)
#: of every target that has several formats, which are its choices
FORMAT = Flag("--format", "file format (default: ckpt; safetensors)")
ACTIVATION = Flag(
    "--activation",
    "of a source that does not record it",
    {"choices": ["relu", "gelu", "gelu_new", "silu"]},
)
CONFIG = Flag(
    "--config",
    "a config.json that says what the source does not record",
    {"type": Path, "metavar": "FILE"},
)
