"""Megatron-LM, torch format."""

from __future__ import annotations

from parammap import families
from parammap.frameworks.flags import Flag
from parammap.frameworks.framework import Framework, Inspection, Patch
from parammap.frameworks.megatron import (
    architecture,
    facts,
    files,
    readback,
    reader,
    shapes,
    target,
)
from parammap.frameworks.megatron.import_model import NATIVE, import_model
from parammap.frameworks.megatron.inspection import unreadable
from parammap.frameworks.megatron.reshard import resharded
from parammap.frameworks.megatron.specification import CHOICES, Options
from parammap.frameworks.target import Target
from parammap.tensors.logical import MODEL_PARAM

TRANSFORMER_IMPL = Flag(
    "--transformer-impl",
    "whose layers a model of another framework gets, as Megatron-LM's flag of that name (default: "
    "transformer_engine)",
    {"choices": CHOICES},
)
MEGATRON = Framework(
    name="megatron",
    recognizes=files.recognizes,
    read=reader.read,
    families=lambda: families.with_dialect(families.LEGACY, families.CORE),
    architecture=architecture.of,
    tied=facts.tied,
    targets=(
        Target(
            name="megatron",
            output=target.output,
            state_dict={},
            options=Options,
            flags=(TRANSFORMER_IMPL,),
            native=NATIVE,
            import_model=import_model,
            resharded=resharded,
            check=readback.check,
        ),
    ),
    contradictions=shapes.contradictions,
    wrong_order=readback.wrong_order,
    inspection=Inspection(
        title="Megatron-LM",
        as_trained=True,
        keeps_args=True,
        recorded=facts.recorded,
        file_kinds={files.MODEL_FILE: "model", files.OPTIMIZER_FILE: "optimizer"},
        weights_state=MODEL_PARAM,
        unreadable=unreadable,
    ),
    patch=Patch("param_map.patch", "Megatron-LM, core_r0.6.0 to core_r0.19.0 and main"),
)
