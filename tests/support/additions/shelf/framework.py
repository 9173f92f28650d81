"""What ParamMap has to know of shelves."""

from __future__ import annotations

from additions.shelf import reader, target

from parammap.families import GPT2
from parammap.frameworks.flags import DTYPE, Flag
from parammap.frameworks.framework import Framework, Inspection
from parammap.frameworks.target import Target

SHELF = Framework(
    name="shelf",
    recognizes=reader.recognizes,
    read=reader.read,
    families=lambda: (GPT2,),
    optimizer=False,
    architecture=reader.architecture,
    targets=(
        Target(
            name="shelf",
            output=target.output,
            options=target.Options,
            flags=(DTYPE, Flag("--label", "what stands on it", {"metavar": "TEXT"})),
            optimizer=False,
        ),
    ),
    inspection=Inspection(title="Shelf"),
)
