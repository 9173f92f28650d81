"""DeepSpeed."""

from __future__ import annotations

from parammap.checkpoint.architecture import BLOOM, GPT2
from parammap.frameworks.deepspeed import architecture, reader, target
from parammap.frameworks.framework import Framework, Inspection
from parammap.frameworks.target import Target

DEEPSPEED = Framework(
    name="deepspeed",
    recognizes=reader.recognizes,
    read=reader.read,
    families=(GPT2, BLOOM),
    architecture=architecture.of,
    targets=(
        Target(
            name="deepspeed", output=target.output, families=(GPT2, BLOOM), needs_optimizer=True
        ),
    ),
    inspection=Inspection(title="Megatron-DeepSpeed"),
)
