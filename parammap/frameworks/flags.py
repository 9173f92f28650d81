"""Flags of `parammap convert` that only some targets have, and those that several of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Flag:
    """`facts` is what argparse is told beside the help. The flag sets the field of the target's
    options that has its name (`max_shard_size` for --max-shard-size) or is argparse's `dest`; left
    out, the field keeps its default."""

    name: str
    help: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def option(self) -> str:
        return str(self.facts.get("dest") or self.name.removeprefix("--").replace("-", "_"))


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
