"""DeepSpeed."""

from __future__ import annotations

from parammap import families
from parammap.frameworks.deepspeed import architecture, reader, target
from parammap.frameworks.framework import Framework, Inspection
from parammap.frameworks.megatron import facts
from parammap.frameworks.target import Target

DEEPSPEED = Framework(
    name="deepspeed",
    recognizes=reader.recognizes,
    read=reader.read,
    families=lambda: families.with_dialect(families.DEEPSPEED),
    architecture=architecture.of,
    tied=facts.tied,
    targets=(
        Target(
            name="deepspeed",
            output=target.output,
            needs_optimizer=True,
        ),
    ),
    inspection=Inspection(title="Megatron-DeepSpeed", recorded=facts.recorded),
)
