"""Writing a shelf."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from additions import tray
from additions.shelf.reader import FACTS, WEIGHTS

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.families import GPT2
from parammap.formats.frames import Literal
from parammap.frameworks.architecture import architecture_for
from parammap.plan.plan import Output, WantedFile
from parammap.plan.source_tensors import SourceTensors
from parammap.tensors.arrangement import Sizes
from parammap.tensors.logical import MAIN_PARAM


@dataclass(frozen=True, slots=True)
class Options:
    dtype: str | None = None
    label: str = ""


def output(source: Checkpoint, options: Options) -> Output:
    model, states = architecture_for(source, (GPT2,), "a shelf"), SourceTensors(source)
    tensors = [
        states.wanted(one, MAIN_PARAM, Sizes(model.heads, model.groups), dtype=options.dtype)
        for one in states.parameters("gpt2")
    ]
    facts = {"label": options.label, "model": asdict(replace(model, config={}))}
    return Output(
        [
            WantedFile(WEIGHTS, tuple(tray.frame([one.spec for one in tensors])), tuple(tensors)),
            WantedFile(FACTS, (Literal(json.dumps(facts).encode()),), ()),
        ],
        [(folder, "") for folder in source.rank_folders.values()],
        [],
        {},
        states=(MAIN_PARAM,),
    )
