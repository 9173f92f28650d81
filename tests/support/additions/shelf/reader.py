"""Reading a shelf."""

from __future__ import annotations

import json
from pathlib import Path

from additions import tray

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import Index, NameResolver, TensorEntry
from parammap.families import Architecture
from parammap.frameworks.framework import ReadOptions
from parammap.tensors.arrangement import Sizes
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import MAIN_PARAM

FACTS, WEIGHTS = "shelf.json", "weights.tray"


def recognizes(source: Path) -> bool:
    return (source / FACTS).is_file()


def architecture(source: Checkpoint) -> Architecture:
    return Architecture(**json.loads((source.folder / FACTS).read_text())["model"])


def read(source: Path, options: ReadOptions) -> Checkpoint:
    model = json.loads((source / FACTS).read_text())["model"]
    naming = NameResolver(
        "gpt2",
        Layout(),
        None,
        None,
        Sizes(model["heads"], model["heads"], model["vocab"]),
        gated=False,
        tied=model["tied"],
    )
    entries = tray.read(source / WEIGHTS).items()
    held = [naming.hold(TensorEntry(name, Place(), MAIN_PARAM, one)) for name, one in entries]
    return Checkpoint(
        "shelf",
        source,
        0,
        Layout(),
        Index(held, Layout()),
        False,
        model["layers"],
        rank_folders={(0, 0, 0): source},
        rank_metadata={},
    )
