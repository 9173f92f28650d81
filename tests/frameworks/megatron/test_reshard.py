"""Closing the circle: A → B → A, A → B → MindSpore → B and A → MindSpore in B → A on real
checkpoints, for random layouts B.

Compared by torch alone: every tensor of the model files and every used element of the optimizer's
buffers bit for bit, arguments, parameter groups and scheduler, and what the hook wrote beside them.
Not equal by design: padding and gaps in the buffers (Megatron leaves garbage there, we write
zeros), each rank's number in its arguments, and the random states of ranks that B has not."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from examples.tiny.options import VOCAB_DIVISOR
from examples.tiny.trained import ROOT, Trained
from examples.tiny.whole import Sizes, cut_for, same
from examples.tiny.whole import whole as live
from parammap.job import conversion
from parammap.job.request import Request
from parammap.tensors.digest import cells_digest
from parammap.tensors.region import Cells
from tests.support.reshards import LLAMA, RUNS, Wanted, assert_same, convert, digests
from tests.support.torch_load import torch_load
from tests.support.way_back import (
    layouts,
    rank_folders,
)

SCHEMA = json.loads((ROOT / "parammap/schemas/layout.schema.json").read_text())

#: the roles of the live state, and what distrib_optim.pt calls them
ROLES = {"main": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
HOW_OFTEN, MOST_RANKS = 50, 16


def own_layout(run: dict[str, Any]) -> Wanted:
    sizes = {name: run.get(name, 1) for name in ("tp", "pp", "vpp", "ep", "dp")}
    chunks, first = sizes["pp"] * sizes["vpp"], run.get("first_stage_layers")
    stages = (
        (first, *[(run["layers"] - first) // (chunks - 1)] * (chunks - 1))
        if first
        else (run["layers"] // chunks,) * chunks
    )
    return Wanted(sizes, stages, VOCAB_DIVISOR)


def random_layout(draw: random.Random, run: dict[str, Any]) -> Wanted:
    """Any layout that the model can have, with no fewer rows in the vocabulary than the run has, so
    that none are lost."""
    tp = draw.choice(
        [size for size in (1, 2, 4, 8) if (run.get("gqa") or run["heads"]) % size == 0]
    )
    ep = draw.choice(
        [
            size
            for size in (1, 2, 4)
            if run.get("experts", 1) % size == 0 and tp * size <= MOST_RANKS
        ]
    )
    pp, vpp = draw.choice(
        [
            (pp, vpp)
            for pp in (1, 2, 3, 4)
            for vpp in (1, 2, 3)
            if pp * vpp <= run["layers"] and tp * pp * ep <= MOST_RANKS and (pp > 1 or vpp == 1)
        ]
    )
    cuts = sorted(draw.sample(range(1, run["layers"]), pp * vpp - 1))
    layers = tuple(
        stop - start for start, stop in zip([0, *cuts], [*cuts, run["layers"]], strict=True)
    )
    # a tied embedding cannot have a bucket of its own where dp does not divide what stands before
    # it (core 0.6)
    dps = (1, 2, 4) if run["core"] == "0.6.0" and not run.get("untie") else (1, 2, 3, 5)
    divisors = [
        size
        for size in (16, 32, 48)
        if padded(run, size * tp) >= padded(run, VOCAB_DIVISOR * run.get("tp", 1))
    ]
    return Wanted(
        {"tp": tp, "pp": pp, "vpp": vpp, "ep": ep, "dp": ep * draw.choice(dps)},
        layers,
        draw.choice(divisors),
    )


def padded(run: dict[str, Any], multiple: int) -> int:
    return -(-run.get("vocab", 250) // multiple) * multiple


@cache
def cases(count: int, seed: int) -> list[tuple[str, Wanted]]:
    """The runs in turn, each with another layout than its own."""
    draw, result = random.Random(seed), []
    while len(result) < count:
        name = list(RUNS)[len(result) % len(RUNS)]
        wanted = random_layout(draw, RUNS[name])
        if wanted.sizes != own_layout(RUNS[name]).sizes:
            result.append((name, wanted))
    return result


def random_layouts(count: int, seed: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("name", "wanted"),
        [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in cases(count, seed)],
    )


def assert_sidecar_is_valid(root: Path, wanted: Wanted) -> None:
    files = layouts(root)
    assert len(files) == wanted.sizes["tp"] * wanted.sizes["pp"] * wanted.sizes["ep"]
    for layout in files.values():
        jsonschema.validate(layout, SCHEMA)
        assert {name: layout["parallel"][name] for name in wanted.sizes} == wanted.sizes
        assert len(layout["chunks"]) == wanted.sizes["vpp"]


def has_all_ranks_of(wanted: Wanted, run: dict[str, Any]) -> bool:
    return all(wanted.sizes[name] >= run.get(name, 1) for name in ("tp", "pp", "ep"))


@random_layouts(HOW_OFTEN, seed=1)
def test_there_and_back_is_where_it_began(trained, tmp_path, name, wanted):
    run = trained(**RUNS[name])
    there = convert(run.path, tmp_path / "b", wanted)
    assert_sidecar_is_valid(tmp_path / "b", wanted)
    back = convert(tmp_path / "b", tmp_path / "a", own_layout(RUNS[name]))
    assert (
        assert_same(tmp_path / "a", run, lost_ranks=not has_all_ranks_of(wanted, RUNS[name]))
        > 100_000
    )
    assert digests(there) == digests(back) and len(digests(there)) > 60


@random_layouts(6, seed=2)
def test_by_way_of_mindspore_in_the_other_layout(trained, tmp_path, name, wanted):
    run = trained(**RUNS[name])
    there = convert(run.path, tmp_path / "ms", wanted, "mindspore")
    assert (
        len(list(tmp_path.glob("ms/rank_*/network.ckpt")))
        == wanted.sizes["tp"] * wanted.sizes["pp"] * wanted.sizes["ep"]
    )
    back = convert(tmp_path / "ms", tmp_path / "a", own_layout(RUNS[name]))
    assert (
        assert_same(tmp_path / "a", run, lost_ranks=not has_all_ranks_of(wanted, RUNS[name]))
        > 100_000
    )
    assert digests(there) == digests(back)


@random_layouts(6, seed=3)
def test_the_other_layout_goes_to_mindspore_and_back_as_its_own_does(
    trained, tmp_path, name, wanted
):
    convert(trained(**RUNS[name]).path, tmp_path / "b", wanted)
    for source, target, to in (("b", "ms", "mindspore"), ("ms", "again", "megatron")):
        assert (
            conversion.convert(
                Request(source=tmp_path / source, target=tmp_path / target, to=to, workers=1)
            ).status
            == 0
        )
    assert assert_same(tmp_path / "again", Trained(tmp_path / "b"), lost_ranks=False) > 100_000


@random_layouts(2 * len(RUNS), seed=4)
def test_every_rank_of_the_other_layout_holds_the_live_state(trained, tmp_path, name, wanted):
    """Cut by hand: a circle closes too where the same mistake is made on both ways."""
    run = trained(**RUNS[name])
    convert(run.path, tmp_path / "b", wanted)
    sizes, compared = Sizes(**wanted.sizes, stage_layers=wanted.stage_layers), 0
    for truth in cut_for(run, sizes, tmp_path / "cut", wanted.divisor).truths():
        folder = Trained(tmp_path / "b").rank_folder(truth)
        model = torch_load(folder / "model_optim_rng.pt")
        chunks = [
            model["model" if sizes.vpp == 1 else f"model{number}"] for number in range(sizes.vpp)
        ]
        assert {
            (number, key)
            for number, chunk in enumerate(chunks)
            for key, value in chunk.items()
            if isinstance(value, torch.Tensor)
        } == set(truth.names())
        for chunk, key in truth.names():
            weight = chunks[chunk][key]
            weight = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight
            assert same(weight.numpy(), truth.array(chunk, key, "weight")), (
                folder.name,
                chunk,
                key,
            )
        for chunk, key, role, values in states_of(tmp_path / "b", folder):
            assert same(values.numpy(), truth.array(chunk, key, role)), (
                folder.name,
                chunk,
                key,
                role,
            )
            compared += 1
    assert compared > 100


def states_of(root: Path, folder: Path) -> Iterator[tuple[int, str, str, torch.Tensor]]:
    """(chunk, name, role, values) of every parameter in a rank's distrib_optim.pt, by the sidecar
    beside it."""
    saved = torch.load(folder / "distrib_optim.pt", weights_only=True)
    layout = layout_of(root, folder.name)
    for link, optimizer in zip(
        saved if isinstance(saved, list) else [saved], layout["optimizers"], strict=True
    ):
        for number, buffer in enumerate(optimizer["buffers"] if optimizer else []):
            (states,) = link[number].values()
            padded = isinstance(states["param"], list)
            starts = [
                0,
                *itertools.accumulate(
                    bucket["end"] - bucket["start"] if padded else bucket["numel_unpadded"]
                    for bucket in buffer["buckets"]
                ),
            ]
            for param, (role, state) in itertools.product(buffer["params"], ROLES.items()):
                start = (
                    starts[param["bucket"]]
                    + param["start"]
                    - buffer["buckets"][param["bucket"]]["start"]
                )
                flat = torch.cat(states[state]) if padded else states[state]
                values = flat[start : start + param["end"] - param["start"]]
                yield buffer["chunk"], param["name"], role, values.view(param["shape"])


def layout_of(root: Path, folder: str) -> dict[str, Any]:
    for layout in layouts(root).values():
        sizes, rank = layout["parallel"], layout["rank"]
        name = f"mp_rank_{rank['tp']:02}" + (f"_{rank['pp']:03}" if sizes["pp"] > 1 else "")
        if folder == name + (f"_{rank['ep']:03}" if sizes["ep"] > 1 else ""):
            return layout
    raise AssertionError(folder)


def test_parts_of_fused_tensors_are_what_their_names_say(trained, tmp_path):
    """Queries, keys and values group by group, gate before up: no layout of bytes depends on it,
    digests do."""
    run = trained(**RUNS["llama"])
    found = digests(
        convert(run.path, tmp_path / "b", random_layout(random.Random(5), RUNS["llama"]))
    )
    state, groups, heads = live(run), LLAMA["gqa"], LLAMA["heads"]
    for role, truth_role in (("weight", "main"), ("exp_avg", "exp_avg")):
        qkv = state[truth_role, "decoder.layers.2.self_attention.linear_qkv.weight"].reshape(
            groups, heads // groups + 2, -1, LLAMA["hidden"]
        )
        gate, up = state[truth_role, "decoder.layers.2.mlp.linear_fc1.weight"]
        parts = {
            "attention.q": qkv[:, :-2],
            "attention.k": qkv[:, -2],
            "attention.v": qkv[:, -1],
            "mlp.gate": gate,
            "mlp.up": up,
        }
        for name, values in parts.items():
            rows = values.reshape(-1, LLAMA["hidden"])
            digest = cells_digest(rows.view(np.uint32), Cells(0, 0, (1,)))
            assert found[role, f"layers.2.{name}.weight"] == (
                "float32",
                rows.shape,
                f"{digest:016x}",
            ), name


def test_where_the_vocabulary_shrinks_and_grows_its_padding_is_copies_of_the_last_row(
    trained, tmp_path
):
    """224 rows of which 200 are words, to 208 and back: the rows between are copies of the last
    that was left."""
    run, rows = trained(**RUNS["padded"]), {}
    convert(run.path, tmp_path / "b", Wanted({"tp": 1}, (4,), VOCAB_DIVISOR))
    convert(tmp_path / "b", tmp_path / "a", own_layout(RUNS["padded"]))
    for root in (run.path, tmp_path / "b", tmp_path / "a"):
        models = [
            torch_load(folder / "model_optim_rng.pt")["model"]
            for folder in rank_folders(root).values()
        ]
        rows[root.name] = torch.cat(
            [model["embedding.word_embeddings.weight"] for model in models]
        ).view(torch.int16)
    original, there, back = rows.values()
    assert [len(one) for one in rows.values()] == [224, 208, 224]
    assert torch.equal(there, original[:208]) and torch.equal(back[:208], there)
    assert torch.equal(back[208:], there[207].expand(16, -1)) and not torch.equal(
        original[208:], back[208:]
    )
