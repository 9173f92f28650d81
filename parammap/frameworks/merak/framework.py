"""Merak."""

from __future__ import annotations

from parammap import families
from parammap.frameworks.flags import ACTIVATION, CONFIG, DTYPE, Flag, numbers, switch
from parammap.frameworks.framework import Framework, Inspection
from parammap.frameworks.megatron import facts
from parammap.frameworks.merak import architecture, partition, reader, target
from parammap.frameworks.target import Target

MERAK = Framework(
    name="merak",
    recognizes=reader.recognizes,
    read=reader.read,
    takes=("metadata_from",),
    families=lambda: families.with_dialect(families.MERAK),
    optimizer=False,
    architecture=architecture.of,
    tied=facts.tied,
    targets=(
        Target(
            name="merak",
            output=target.output,
            state_dict={},
            options=target.Options,
            flags=(
                DTYPE,
                ACTIVATION,
                CONFIG,
                Flag(
                    "--partition-method",
                    "how modules are cut over stages (default: uniform)",
                    {"choices": partition.METHODS},
                ),
                Flag(
                    "--custom-partition",
                    "the first module of each stage, and their number",
                    {"type": numbers, "metavar": "0,N,…"},
                ),
                Flag(
                    "--folder",
                    "name of the folder (default: release)",
                    {"choices": target.FOLDERS},
                ),
                Flag(
                    "--scheme",
                    "where the one file of tp 1, pp 1 goes (default: all_dp, as up to v2.2.1)",
                    {"choices": target.SCHEMES},
                ),
                Flag(
                    "--serialization",
                    "torch's file format (default: zip)",
                    {"choices": sorted(target.FORMATS)},
                ),
                switch(
                    "--no-parallel-vocab",
                    "the whole vocabulary on each rank",
                    sets=False,
                    dest="parallel_vocab",
                ),
                switch("--for-release", "zero the counters of consumed samples"),
            ),
            sizes={"tp": "tp", "pp": "pp"},
            optimizer=False,
        ),
    ),
    inspection=Inspection(title="Merak", recorded=facts.recorded),
)
