"""Megatron-LM, --ckpt-format torch_dist."""

from __future__ import annotations

from parammap.checkpoint.architecture import GPT2, LLAMA, MIXTURE
from parammap.frameworks.framework import Framework, Inspection
from parammap.frameworks.megatron import architecture, readback, shapes
from parammap.frameworks.megatron.framework import TRANSFORMER_IMPL
from parammap.frameworks.megatron.import_model import NATIVE, import_model
from parammap.frameworks.megatron_dist import reader, target
from parammap.frameworks.target import Target

FAMILIES = (GPT2, LLAMA, MIXTURE)
MEGATRON_DIST = Framework(
    name="megatron-dist",
    recognizes=reader.recognizes,
    read=reader.read,
    families=FAMILIES,
    architecture=architecture.of,
    targets=(
        Target(
            name="megatron-dist",
            output=target.output,
            families=FAMILIES,
            options=target.Options,
            flags=(TRANSFORMER_IMPL,),
            native=NATIVE,
            import_model=import_model,
            sizes={"ep": "ep"},
        ),
    ),
    contradictions=shapes.contradictions,
    wrong_order=readback.misplaced,
    inspection=Inspection(keeps_args=True, file_kinds={}),
)
