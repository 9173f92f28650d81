"""What the tests of test_goldens share with others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

RENAMES = {
    "self_attention": "attention",
    "query_key_value": "qkv_proj",
    "dense": "out_proj",
    "dense_h_to_4h": "mapping",
    "dense_4h_to_h": "projection",
}

#: golden: global number of each stage's layers by (pp, chunk), and the ranks of the output by (tp,
#: pp)
GOLDENS = {
    "cac60ce4_patched_legacy_tp2pp2": (
        {(0, 0): [0, 1], (1, 0): [2, 3]},
        lambda tp, pp: pp * 2 + tp,
    ),
    "cac60ce4_patched_legacy_pp4vpp2": (
        {(p, v): [4 * v + p] for p in range(4) for v in range(2)},
        lambda tp, pp: pp,
    ),
    "cac60ce4_patched_legacy_pp2dp3_untied_padded": (
        {(0, 0): [0, 1], (1, 0): [2, 3]},
        lambda tp, pp: pp * 3,
    ),
}

_JOINED_ALONG = {
    "qkv_proj.weight": 0,
    "qkv_proj.bias": 0,
    "mapping.weight": 0,
    "mapping.bias": 0,
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "out_proj.weight": 1,
    "projection.weight": 1,
}


def mindspore_name(name: str, layers: list[int], layer_norm: bool) -> str:
    """A Megatron legacy parameter's name as MindSpeed-Core-MS's model has it."""
    parts = name.removeprefix("module.").split(".")
    if name.endswith("word_embeddings.weight") and "embedding" not in parts:
        return "language_model.output_layer.weight"
    if "layers" in parts:
        at = parts.index("layers") + 1
        parts[at] = str(layers[int(parts[at])])
    parts = [RENAMES.get(part, part) for part in parts]
    if layer_norm and parts[-2].endswith("norm"):
        parts[-1] = {"weight": "gamma", "bias": "beta"}[parts[-1]]
    return ".".join(parts)


def buckets_of(buffer: dict, state: str) -> np.ndarray:
    """A whole padded buffer from core 0.6's list of padded buckets."""
    return torch.cat([bucket.view(-1) for bucket in buffer[state]]).numpy()


def truth(golden: Path, layers: dict) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """{(tp, pp): {MindSpore name: array}} of weights and moments, by torch and the live index
    map."""
    result = {}
    for path in sorted((golden / "truth").glob("rank*.json")):
        rank = json.loads(path.read_text())
        if rank["dp"] != 0:
            continue
        pipeline = f"_{rank['pp']:03d}" if len(layers) > 1 else ""
        folder = golden / "iter_0000002" / f"mp_rank_{rank['tp']:02d}{pipeline}"
        saved = torch.load(folder / "distrib_optim.pt", weights_only=True)
        arrays = result.setdefault((rank["tp"], rank["pp"]), {})
        for gbuf, live in enumerate(rank["chunks"]):
            (buffer,) = saved[gbuf].values()
            for role, prefix in (
                ("param", ""),
                ("exp_avg", "exp_avg."),
                ("exp_avg_sq", "exp_avg_sq."),
            ):
                flat = buckets_of(buffer, role)
                assert len(flat) == live["numel"]
                for name, shape, start, end, _ in live["params"]:
                    key = mindspore_name(name, layers[rank["pp"], live["chunk"]], layer_norm=True)
                    arrays[prefix + key] = flat[start:end].reshape(shape)
    return result


def joined(golden: Path) -> dict[str, np.ndarray]:
    """A golden's whole state as a run without parallelism would hold it: {MindSpore name:
    array}."""
    ranks, result = truth(golden, GOLDENS[golden.name][0]), {}
    for pp in (0, 1):
        for name, first in ranks[0, pp].items():
            pieces = [first] + ([ranks[1, pp][name]] if (1, pp) in ranks else [])
            along = _JOINED_ALONG.get(".".join(name.split(".")[-2:]))
            result[name] = first if along is None else np.concatenate(pieces, axis=along)
    return result
