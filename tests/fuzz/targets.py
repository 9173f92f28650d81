"""What is fuzzed: a target per file format, whose reader gets a damaged file, and one per reader of a
framework, whose whole conversion gets a checkpoint of which one file is damaged."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import parammap
from parammap.formats import (
    mindspore_ckpt,
    npy,
    pickles,
    safetensors,
    torch_legacy,
)
from parammap.formats.frames import write
from parammap.tensors.logical import TensorSpec
from tests.fuzz import mutators
from tests.fuzz.mutators import Mutator
from tests.fuzz.outputs import check_pickles
from tests.support.output_matrix import source as source_of

#: a run of one case: what came of it
Run = Callable[[random.Random], str]
EQUAL, OTHER = "read equal", "read other"


@dataclass(frozen=True, slots=True)
class Target:
    """`prepare` makes the honest input in a scratch folder and gives the function that runs a case.
    `cases` is how many of them the quick tests run."""

    prepare: Callable[[Path], Run]
    cases: int


# ------------------------------------------------------------------------------------------------
# formats


def _format(
    name: str, content: Callable[[], bytes], mutate: Mutator, read: Callable[[Path], Any]
) -> Target:
    def prepare(scratch: Path) -> Run:
        honest, path = content(), scratch / name
        path.write_bytes(honest)
        expected = repr(read(path))

        def run(random: random.Random) -> str:
            path.write_bytes((mutators.raw if random.random() < 0.2 else mutate)(honest, random))
            return EQUAL if repr(read(path)) == expected else OTHER

        return run

    return Target(prepare, cases=150)


def _tree() -> dict[str, Any]:
    args = {"num_layers": 2, "lr": 1e-4, "name": "x", "rank": (0, 1), "sets": {1, 2}}
    weights = {f"layers.{n}.weight": torch.arange(6.0).reshape(2, 3) for n in range(2)}
    return {"args": args, "model": weights, "step": torch.tensor(3), "iteration": 7}


def _saved(**options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(_tree(), out, **options)
    return out.getvalue()


def _framed(frame: Callable[..., Any]) -> bytes:
    specs = [
        TensorSpec("a", "float32", (2, 3), bytes(24)),
        TensorSpec("b.c", "int64", (), bytes(8)),
    ]
    out = io.BytesIO()
    write(frame(specs), lambda hole: [], out)
    return out.getvalue()


def _npy() -> bytes:
    out = io.BytesIO()
    np.save(out, np.arange(6, dtype="float32").reshape(2, 3))
    return out.getvalue()


def _pickle() -> bytes:
    tree = {**_tree(), "model": {}, "step": [np.float64(1), np.arange(3)], "dtype": torch.float32}
    return pickle.dumps(tree, 4)


FORMATS = {
    "pickle": _format("a.pkl", _pickle, mutators.pickled, pickles.read),
    "torch zip": _format("a.pt", _saved, mutators.zipped, torch_legacy.read_either),
    "torch legacy": _format(
        "b.pt",
        functools.partial(_saved, _use_new_zipfile_serialization=False),
        mutators.pickled,
        torch_legacy.read_either,
    ),
    "safetensors": _format(
        "a.safetensors", lambda: _framed(safetensors.frame), mutators.safetensored, safetensors.read
    ),
    "ckpt": _format(
        "a.ckpt", lambda: _framed(mindspore_ckpt.frame), mutators.protobuffed, mindspore_ckpt.read
    ),
    "npy": _format("a.npy", _npy, mutators.headed, npy.read),
}

# ------------------------------------------------------------------------------------------------
# readers

_BY_START: dict[bytes, Mutator] = {
    b"{": mutators.jsoned,
    b"[": mutators.jsoned,
    b"PK": mutators.zipped,
    b"\x93NUMPY": mutators.headed,
    b"\x80": mutators.pickled,
    b"\x0a": mutators.protobuffed,
}


def _damaged(path: Path, content: bytes, random: random.Random) -> bytes:
    """Another content for a file, by the kind that it is of."""
    kinds = [one for start, one in _BY_START.items() if content.startswith(start)]
    mutate = mutators.safetensored if path.suffix == ".safetensors" else [*kinds, mutators.raw][0]
    return mutate(content, random)


def _reader(source: str, to: str, **options: Any) -> Target:
    """Conversions of a source of the output matrix, one of whose files is damaged."""

    def prepare(scratch: Path) -> Run:
        damaged, out = scratch / "source", scratch / "out"
        shutil.copytree(source_of(source, scratch / "made"), damaged, symlinks=True)
        convert = functools.partial(parammap.convert, damaged, out, to=to, **options)
        files = _opened_by(convert, damaged)
        expected = _digest(out)

        def run(random: random.Random) -> str:
            path = random.choice(files)
            content = path.read_bytes()
            path.unlink()
            if random.random() > 0.03:
                path.write_bytes(_damaged(path, content, random))
            shutil.rmtree(out, ignore_errors=True)
            try:
                convert()
                check_pickles(out)
                return EQUAL if _digest(out) == expected else OTHER
            finally:
                path.unlink(missing_ok=True)
                path.write_bytes(content)

        return run

    return Target(prepare, cases=10)


def _opened_by(call: Callable[[], object], folder: Path) -> list[Path]:
    """The files of a folder that a call opens."""
    opened: set[Path] = set()
    watching = True

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            opened.add(Path(arguments[0]))

    sys.addaudithook(note)
    call()
    watching = False
    return sorted(path for path in opened if folder in path.parents and path.is_file())


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "parammap_manifest.json":
            total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


_TP2PP2 = "megatron/cac60ce4_patched_legacy_tp2pp2"
READERS = {
    "megatron": _reader(_TP2PP2, "mindspore", tp=1, pp=1),
    "megatron core": _reader("megatron/torch_dist_in_order_of_keys", "transformers"),
    "megatron weights": _reader("transformers/llama_tp2pp2", "megatron", weights_only=True),
    "megatron-dist": _reader(f"megatron-dist of {_TP2PP2}", "mindspore"),
    "mindspore": _reader(f"mindspore of {_TP2PP2}", "megatron"),
    "deepspeed": _reader("deepspeed/mds_gpt_pp2tp2dp2_bf16", "megatron", replicas="first"),
    "deepspeed universal": _reader(f"deepspeed of {_TP2PP2}", "megatron-dist"),
    "metaseq": _reader("metaseq/mp2dp2_fp16", "metaseq", tp=4, dp=1),
    "alpa": _reader("alpa/mp2dp2_fp16/alpa_np", "alpa", dtype="float32"),
    "merak": _reader("merak/ds_gpt_to_merak_tp2pp2", "megatron", tp=1, pp=1),
    "merak zero": _reader("merak/zero_tp2pp2dp2", "alpa-training", activation="gelu_new"),
    "transformers": _reader("transformers/llama_hf", "megatron", weights_only=True),
    "yuan": _reader("yuan/trained_tp1pp2dp3", "megatron", tp=1, pp=1),
}

TARGETS = {**FORMATS, **READERS}
