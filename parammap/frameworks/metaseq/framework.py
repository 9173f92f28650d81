"""Metaseq."""

from __future__ import annotations

from parammap import families
from parammap.frameworks.flags import DTYPE, Flag
from parammap.frameworks.framework import Framework, Inspection, Patch
from parammap.frameworks.metaseq import architecture, inspection, reader, target
from parammap.frameworks.metaseq.import_model import import_model
from parammap.frameworks.metaseq.reshard import resharded
from parammap.frameworks.target import Target

METASEQ = Framework(
    name="metaseq",
    recognizes=reader.recognizes,
    read=reader.read,
    takes=("metadata_from", "ema"),
    families=lambda: families.with_dialect(families.METASEQ),
    architecture=architecture.of,
    targets=(
        Target(
            name="metaseq",
            output=target.output,
            state_dict={"form": target.SINGLETON},
            options=target.Options,
            flags=(
                DTYPE,
                Flag(
                    "--form",
                    "flat parameters, whole tensors, or one file for all (default: flat)",
                    {"choices": sorted(target.NAMES)},
                ),
            ),
            native=("metaseq",),
            import_model=import_model,
            resharded=resharded,
            sizes={"dp": "shards"},
        ),
    ),
    inspection=Inspection(
        title="Metaseq",
        layout=inspection.layout,
        flat_parameters=inspection.flat_parameters,
        sidecar=inspection.sidecar,
    ),
    patch=Patch("metaseq_param_map.patch", "metaseq, main and its branches"),
)
