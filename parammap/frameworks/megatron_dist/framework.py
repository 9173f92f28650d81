"""Megatron-LM, --ckpt-format torch_dist."""

from __future__ import annotations

from parammap import families
from parammap.frameworks.framework import Framework, Inspection
from parammap.frameworks.megatron import architecture, facts, readback, shapes
from parammap.frameworks.megatron.framework import TRANSFORMER_IMPL
from parammap.frameworks.megatron.import_model import NATIVE, import_model
from parammap.frameworks.megatron_dist import reader, target
from parammap.frameworks.target import Target

MEGATRON_DIST = Framework(
    name="megatron-dist",
    recognizes=reader.recognizes,
    read=reader.read,
    families=lambda: families.with_dialect(families.CORE),
    architecture=architecture.of,
    tied=facts.tied,
    targets=(
        Target(
            name="megatron-dist",
            output=target.output,
            options=target.Options,
            flags=(TRANSFORMER_IMPL,),
            native=NATIVE,
            import_model=import_model,
            sizes={"ep": "ep"},
        ),
    ),
    contradictions=shapes.contradictions,
    wrong_order=readback.misplaced,
    inspection=Inspection(keeps_args=True, recorded=facts.recorded, file_kinds={}),
)
