"""Alpa: what llm_serving reads, and what its trainings resume from, which is written and not
read."""

from __future__ import annotations

from parammap.families import BLOOM, GPT2, OPT
from parammap.frameworks.alpa import architecture, reader, serving, training
from parammap.frameworks.flags import ACTIVATION, DTYPE, Flag, positive
from parammap.frameworks.framework import Framework, Inspection
from parammap.frameworks.target import Target

_VOCAB_SIZE = Flag(
    "--vocab-size",
    "rows of the word embedding (default: the source's)",
    {"type": positive, "metavar": "N"},
)
ALPA = Framework(
    name="alpa",
    recognizes=reader.recognizes,
    read=reader.read,
    families=lambda: (OPT, BLOOM),
    optimizer=False,
    architecture=architecture.of,
    targets=(
        Target(
            name="alpa",
            output=serving.output,
            state_dict={},
            options=serving.Options,
            flags=(DTYPE, _VOCAB_SIZE, ACTIVATION),
            optimizer=False,
        ),
        Target(
            name="alpa-training",
            output=training.output,
            families=lambda: (GPT2, OPT),
            options=training.Options,
            flags=(
                DTYPE,
                _VOCAB_SIZE,
                ACTIVATION,
                Flag(
                    "--model",
                    "whose tree (default: opt for OPT, else gpt2)",
                    {"choices": sorted(training.MODELS)},
                ),
                Flag(
                    "--optimizer",
                    "whose state (default: examples, that of Alpa's own)",
                    {"choices": sorted(training.OPTIMIZERS)},
                ),
            ),
            needs_optimizer=True,
        ),
    ),
    inspection=Inspection(title="Alpa", layout=lambda sizes: "one folder of whole tensors"),
)
