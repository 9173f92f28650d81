"""Holds the sidecars of a real checkpoint to the live training state that was saved beside it.

Everything else is read with torch from Megatron's own files: a layout is right if slicing
distrib_optim.pt by it gives, bit for bit, the main weight and moments of the live parameter of that
name."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import numpy as np
import torch

from examples.tiny.trained import Trained, Truth
from tests.support.mlm_entry import ROOT, flatten

SCHEMA = json.loads((ROOT / "parammap/schemas/layout.schema.json").read_text())
ROLES = {"param": "main", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def check(trained: Trained) -> int:
    """Check every rank's layout, maps and args; returns the number of parameters whose state was
    compared."""
    folder = trained.iteration_folder / "param_map"
    assert_latest_is(folder, trained.path / "param_map")
    return sum(check_rank(trained, truth, folder) for truth in trained.truths())


def check_rank(trained: Trained, truth: Truth, folder: Path) -> int:
    rank_folder = trained.rank_folder(truth)
    layout = json.loads((folder / f"layout{suffix(truth)}.json").read_text())
    jsonschema.validate(layout, SCHEMA)
    assert_facts(layout, truth, trained.iteration)
    model = torch.load(
        rank_folder / "model_optim_rng.pt", pickle_module=inert_pickle(), weights_only=False
    )
    weights = {
        (int(key[5:] or 0), name)
        for key, state in model.items()
        if key.startswith("model")
        for name, _ in flatten(state)
    }
    saved = torch.load(rank_folder / "distrib_optim.pt", weights_only=True)
    states = saved if isinstance(saved, list) else [saved]
    assert len(states) == len(layout["optimizers"]) == len(truth.meta["buffers"])
    compared = 0
    for state, optimizer, live in zip(
        states, layout["optimizers"], truth.meta["buffers"], strict=True
    ):
        assert (state is None) == (optimizer is None)
        if optimizer is not None:
            assert [as_live(buffer) for buffer in optimizer["buffers"]] == live
            for gbuf, buffer in enumerate(optimizer["buffers"]):
                compared += compare_state(state[gbuf], buffer, truth, weights)
    assert_maps(layout, truth, folder)
    return compared


def suffix(truth: Truth) -> str:
    tp, pp, ep = truth.place
    return f"_tp{tp:02}_pp{pp:03}" + (
        f"_ep{ep:03}" if truth.meta["args"]["expert_model_parallel_size"] > 1 else ""
    )


def assert_facts(layout: dict[str, Any], truth: Truth, iteration: int) -> None:
    args, parallel = truth.meta["args"], layout["parallel"]
    assert layout["framework"]["core_version"] == truth.meta["core"]
    assert (layout["iteration"], layout["checkpoint_format"]) == (iteration, "torch")
    assert {axis: layout["rank"][axis] for axis in ("tp", "pp", "ep")} == truth.meta["place"]
    assert parallel["tp"] == args["tensor_model_parallel_size"]
    assert parallel["pp"] == args["pipeline_model_parallel_size"]
    assert parallel["ep"] == args["expert_model_parallel_size"]
    assert parallel["dp"] == args["data_parallel_size"]
    assert parallel["cp"] == args["context_parallel_size"]
    assert parallel["world_size"] == args["world_size"]
    assert parallel["vpp"] == len(layout["chunks"]) == len(truth.meta["layers"])
    assert [numbers for chunk in layout["chunks"] for numbers in chunk["layers"].values()] == [
        numbers for numbers in truth.meta["layers"] if numbers
    ]
    for fact in ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size"):
        assert layout["model"][fact] == args[fact], fact


def as_live(buffer: dict[str, Any]) -> dict[str, Any]:
    """A buffer of the layout in the terms of the live truth."""
    return {
        "dtype": buffer["param_dtype"],
        "numel": buffer["numel"],
        "buckets": buffer["buckets"],
        "params": {
            f"{buffer['chunk']}/{param['name']}": [param["start"], param["end"], param["bucket"]]
            for param in buffer["params"]
        },
    }


def compare_state(
    state: dict[Any, Any], buffer: dict[str, Any], truth: Truth, weights: set[tuple[int, str]]
) -> int:
    """One gbuf's slices against the live arrays. 0.6: padded buckets; 0.7 on: unpadded buckets back
    to back."""
    (stored,) = state.values()
    buckets = buffer["buckets"]
    is_padded = isinstance(stored["param"], list)
    stored_numel = [
        bucket["end"] - bucket["start"] if is_padded else bucket["numel_unpadded"]
        for bucket in buckets
    ]
    flat = {
        role: (torch.cat(stored[role]) if is_padded else stored[role]).numpy() for role in ROLES
    }
    assert {values.size for values in flat.values()} == {sum(stored_numel)}
    for param in buffer["params"]:
        key, live = (
            (buffer["chunk"], param["name"]),
            truth.meta["params"][f"{buffer['chunk']}/{param['name']}"],
        )
        assert key in weights, f"{key} is not in model_optim_rng.pt"
        assert (param["dtype"], param["shape"], param["expert"]) == (
            live["dtype"],
            live["shape"],
            live["expert"],
        )
        at = (
            param["start"]
            - buckets[param["bucket"]]["start"]
            + sum(stored_numel[: param["bucket"]])
        )
        for role, live_role in ROLES.items():
            found = flat[role][at : at + param["end"] - param["start"]].reshape(param["shape"])
            assert np.array_equal(
                found.view(np.uint32), truth.array(*key, live_role).view(np.uint32)
            ), (key, role)
    return len(buffer["params"])


def assert_maps(layout: dict[str, Any], truth: Truth, folder: Path) -> None:
    """The compatible maps say what the layout says; only the tied head of a legacy last stage has
    another name."""
    tp, pp, ep = truth.place
    tail = f"ep{ep}" if layout["parallel"]["ep"] > 1 else ""
    mapped = {}
    for vpp in range(layout["parallel"]["vpp"]):
        for file in folder.glob(f"param_map_buffer*_dp0tp{tp}pp{pp}vpp{vpp}{tail}.json"):
            mapped |= {(vpp, name): entry for name, entry in json.loads(file.read_text()).items()}
    said = {
        (
            buffer["chunk"],
            "module." + param["name"].replace("word_embeddings_for_head", "word_embeddings"),
        ): [
            f"torch.{param['dtype']}",
            param["shape"],
            param["start"],
            param["end"],
            param["bucket"],
        ]
        for buffer, param in layout_params(layout)
    }
    assert mapped == said


def layout_params(layout: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for optimizer in layout["optimizers"]:
        for buffer in optimizer["buffers"] if optimizer else ():
            for param in buffer["params"]:
                yield buffer, param


def assert_latest_is(iteration_copy: Path, latest: Path) -> None:
    files = {file.name: file.read_bytes() for file in iteration_copy.iterdir()}
    assert files == {file.name: file.read_bytes() for file in latest.iterdir()}
    assert not [name for name in files if name.endswith(".part")]


def inert_pickle() -> ModuleType:
    """A pickle module for torch.load: what is Megatron's own becomes an empty object."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return _Inert if module.startswith("megatron") else super().find_class(module, name)

    module = ModuleType("inert_pickle")
    module.Unpickler, module.load, module.loads = Unpickler, pickle.load, pickle.loads
    return module


class _Inert:
    def __init__(self, *args: Any) -> None:
        self.args = args
