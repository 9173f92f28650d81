"""Hugging Face's transformers."""

from __future__ import annotations

from parammap import families
from parammap.frameworks.flags import ACTIVATION, CONFIG, DTYPE, Flag
from parammap.frameworks.framework import Framework, Inspection
from parammap.frameworks.target import Target
from parammap.frameworks.transformers import architecture, reader, target
from parammap.frameworks.transformers.files import FORMATS

TRANSFORMERS = Framework(
    name="transformers",
    recognizes=reader.recognizes,
    read=reader.read,
    families=lambda: families.with_dialect("transformers"),
    optimizer=False,
    architecture=architecture.of,
    targets=(
        Target(
            name="transformers",
            output=target.output,
            state_dict={},
            options=target.Options,
            flags=(
                DTYPE,
                ACTIVATION,
                CONFIG,
                Flag(
                    "--max-shard-size",
                    "of a file of weights, as 5GB or 200MB (default: 5GB)",
                    {"type": target.shard_size, "metavar": "SIZE"},
                ),
            ),
            formats=tuple(FORMATS),
            optimizer=False,
        ),
    ),
    inspection=Inspection(title="Transformers"),
)
