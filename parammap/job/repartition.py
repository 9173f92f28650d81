"""What Yuan-2.0's split_tp, merge_tp and merge_pp tools do, in one step."""

from __future__ import annotations

import argparse
import re

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.frameworks import registry
from parammap.frameworks.megatron import reader as megatron
from parammap.frameworks.megatron.facts import args_of
from parammap.job.conversion import convert
from parammap.job.request import Request
from parammap.name_list import shorten_names

SIZES = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size"}

NUMBERS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")


def repartition(args: argparse.Namespace, others: list[str]) -> int:
    there = {size: getattr(args, name) for size, name in SIZES.items() if getattr(args, name)}
    source = registry.read(args.load, weights_only=True, sizes=there)
    _check(args, others, source)
    wanted = {
        size: getattr(args, f"target_{name}") or getattr(source.layout, size)
        for size, name in SIZES.items()
    }
    without = not any(
        (folder / megatron.OPTIMIZER_FILE).is_file() for folder in source.rank_folders.values()
    )
    report = convert(
        Request(
            source=args.load,
            target=args.save,
            to="megatron",
            sizes=wanted,
            source_sizes=there,
            stage_layers=args.target_pipeline_model_parallel_blocks or (),
            source_stage_layers=args.pipeline_model_parallel_blocks or (),
            only_pp=_only(args.pipeline_generate_layer, source.layout.pp, wanted["pp"]),
            only_tp=_only(args.tensor_generate_layer, source.layout.tp, wanted["tp"]),
            weights_only=args.no_load_optim or without,
            replicas=args.replicas,
            workers=args.workers,
            overwrite=args.overwrite,
        )
    )
    notes = (
        [f"{args.load}: no {megatron.OPTIMIZER_FILE} there: the weights alone"] if without else []
    )
    print(
        "\n".join(
            [*notes, *([f"not needed: {shorten_names(others)}"] if others else []), *report.lines]
        )
    )
    return report.status


def _check(args: argparse.Namespace, others: list[str], source: Checkpoint) -> None:
    if unknown := [
        flag for flag in others if re.search("target|generate|parallel-(size|blocks)", flag)
    ]:
        raise RefusedError(
            f"{shorten_names(unknown)}: no such flag; --help lists those that there are"
        )
    saved = args_of(next(iter(source.rank_metadata.values())))
    for name, number in (
        {name: saved.get(name) for name in NUMBERS} | {"target_num_layers": source.num_layers}
    ).items():
        if number not in (None, getattr(args, name) or number):
            raise RefusedError(
                f"{args.load}: --{name.replace('_', '-')} is {number} there and not "
                f"{getattr(args, name)}; "
                "leave it out"
            )
    if not args.no_load_optim and any(
        "fp32_from_fp16_params" in (m.get("optimizer") or ()) for m in source.rank_metadata.values()
    ):
        raise RefusedError(
            f"{args.load}: its optimizer is not a distributed one; --no-load-optim leaves it behind"
        )


def _only(named: tuple[int, ...] | None, source: int, target: int) -> frozenset[int]:
    """The ranks to write, empty for all."""
    if named is None or set(named) == set(range(source)):
        return frozenset()
    if source != target or not set(named) < set(range(source)):
        raise RefusedError(
            f"{','.join(map(str, named))}: no part of 0 to {source - 1}, or these are not the "
            f"output's "
            f"0 to {target - 1}: name all of the source's, or none"
        )
    return frozenset(named)
