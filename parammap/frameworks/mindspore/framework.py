"""MindSpore, as MindSpeed-Core-MS lays its checkpoints out."""

from __future__ import annotations

from parammap import families
from parammap.frameworks.flags import DTYPE, Flag, switch
from parammap.frameworks.framework import Framework, Inspection
from parammap.frameworks.megatron import architecture, facts, readback, shapes
from parammap.frameworks.megatron.framework import TRANSFORMER_IMPL
from parammap.frameworks.megatron.import_model import NATIVE, import_model
from parammap.frameworks.megatron.reshard import resharded
from parammap.frameworks.mindspore import reader, target
from parammap.frameworks.mindspore.formats import BY_SUFFIX, FORMATS
from parammap.frameworks.target import Target

MINDSPORE = Framework(
    name="mindspore",
    recognizes=reader.recognizes,
    read=reader.read,
    families=lambda: families.with_dialect(families.MINDSPORE),
    architecture=architecture.of,
    tied=facts.tied,
    targets=(
        Target(
            name="mindspore",
            output=target.output,
            state_dict={},
            options=target.Options,
            flags=(
                DTYPE,
                Flag(
                    "--names",
                    "whose tensor names (default: mindspore)",
                    {"choices": target.NAMES},
                ),
                Flag(
                    "--file-prefix",
                    "file name without ending (default: network)",
                    {"metavar": "NAME"},
                ),
                switch(
                    "--generate-all-dp-cp", "a file for every rank, as hard links where possible"
                ),
                TRANSFORMER_IMPL,
            ),
            formats=tuple(FORMATS),
            native=NATIVE,
            import_model=import_model,
            resharded=resharded,
            sizes={"dp": "dp", "cp": "cp"},
            weights_only_dtypes=("float32",),
        ),
    ),
    contradictions=shapes.contradictions,
    wrong_order=readback.misplaced,
    inspection=Inspection(
        title="MindSpore",
        keeps_args=True,
        recorded=facts.recorded,
        file_kinds=dict.fromkeys(BY_SUFFIX, "tensors"),
        unreadable=None,
    ),
)
