"""What the tests of test_way_back share with others."""

from __future__ import annotations

import json
import math

import numpy as np
import torch


def rank_folders(root):
    (iteration,) = root.glob("iter_*")
    return {path.name: path for path in iteration.glob("mp_rank_*")}


def assert_equal(ours, theirs, where=""):
    """Deep equality, tensors by their bits."""
    assert type(ours) is type(theirs) or {type(ours), type(theirs)} <= {
        dict,
        __import__("collections").OrderedDict,
    }, where
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, where
        assert torch.equal(
            ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)
        ), where
    elif isinstance(theirs, np.ndarray):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), (where, set(ours) ^ set(theirs))
        for key in theirs:
            assert_equal(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where}/{number}")
    elif hasattr(theirs, "__dict__") and not isinstance(theirs, type):
        assert_equal(vars(ours), vars(theirs), where)
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), (where, ours, theirs)


def used(live, numel_in_file):
    """Which elements of a buffer's file content belong to a parameter, by the live index map, and
    how many there are.

    core 0.6 keeps padded buckets one after the other, later releases the unpadded ones.
    """
    starts = [start for start, _ in live["bucket_indices"]]
    padded = numel_in_file == live["numel"]
    shift = starts if padded else [sum(live["unpadded"][:number]) for number in range(len(starts))]
    mask = np.zeros(numel_in_file, bool)
    for _, shape, start, end, bucket in live["params"]:
        low = start - starts[bucket] + shift[bucket]
        assert end - start == math.prod(shape) and not mask[low : low + end - start].any()
        mask[low : low + end - start] = True
    return mask


def assert_optimizer_equal(ours, theirs, live_buffers):
    """live_buffers: for each optimizer of the chain, its buffers' live index maps in order."""
    chains = [link if isinstance(link, list) else [link] for link in (ours, theirs)]
    assert len(chains[0]) == len(chains[1])
    compared = 0
    for mine, original, buffers in zip(*chains, live_buffers, strict=True):
        if original is None:
            assert mine is None
            continue
        assert {k for k in mine if isinstance(k, str)} == {
            k for k in original if isinstance(k, str)
        }
        for key in original:
            if isinstance(key, str):
                assert mine[key] == original[key]
        for gbuf, live in enumerate(buffers):
            ((dtypes, states),) = original[gbuf].items()
            assert list(mine[gbuf]) == [dtypes] and set(mine[gbuf][dtypes]) == set(states)
            for state, value in states.items():
                if isinstance(value, int):
                    assert mine[gbuf][dtypes][state] == value
                    continue
                a, b = (
                    torch.cat(v) if isinstance(v, list) else v
                    for v in (mine[gbuf][dtypes][state], value)
                )
                assert a.dtype == b.dtype and a.shape == b.shape
                mask = used(live, b.numel())
                assert np.array_equal(
                    a.numpy()[mask].view(np.uint32), b.numpy()[mask].view(np.uint32)
                ), (gbuf, state)
                compared += int(mask.sum())
    assert compared or all(link is None for link in chains[1])


def layouts(root):
    return {
        path.name: json.loads(path.read_text())
        for path in root.glob("iter_*/param_map/layout_*.json")
    }


def live_of_run(run, folder):
    """The live buffers as the hook wrote them down; tests/live/test_hook.py holds those to the
    running process."""
    for layout in layouts(run.path).values():
        rank = layout["rank"]
        numbers = [f"{rank['tp']:02d}"]
        numbers += [f"{rank['pp']:03d}"] * (layout["parallel"]["pp"] > 1) + [
            f"{rank['ep']:03d}"
        ] * (layout["parallel"]["ep"] > 1)
        if folder == "_".join(["mp_rank", *numbers]):
            return [
                [
                    {
                        "numel": b["numel"],
                        "bucket_indices": [(k["start"], k["end"]) for k in b["buckets"]],
                        "unpadded": [k["numel_unpadded"] for k in b["buckets"]],
                        "params": [
                            (p["name"], p["shape"], p["start"], p["end"], p["bucket"])
                            for p in b["params"]
                        ],
                    }
                    for b in (link or {"buffers": []})["buffers"]
                ]
                for link in layout["optimizers"]
            ]
    raise AssertionError(folder)
