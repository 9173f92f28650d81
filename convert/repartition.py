"""What Yuan-2.0's split_tp, merge_tp and merge_pp tools do, in one step, with the flags that their users know.

A size that is left out is the source's. Flags that only describe the model are not needed; a number that contradicts the
checkpoint is an error. As documented by Yuan-2.0, flags may have dashes at their end.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "convert"

from . import frameworks
from .checkpoint import Checkpoint
from .cli import run
from .commands import positive
from .errors import RefusedError
from .frameworks.megatron import reader as megatron
from .frameworks.megatron.facts import args_of
from .job import convert
from .naming import brief
from .planner import FIRST, MEAN, REFUSE
from .request import Request

_SIZES = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size"}
_NUMBERS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")


def main(argv: Sequence[str] | None = None) -> int:
    argv = [arg.rstrip("-") if arg.startswith("--") else arg for arg in (sys.argv[1:] if argv is None else argv)]
    args, others = _parser().parse_known_args(argv)
    return run(lambda: _repartition(args, [other.partition("=")[0] for other in others if other.startswith("--")]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for flags, kind, what in (
            (("--load", "--save"), Path, "the checkpoint to read, the folder to make"),
            ([f"--{name}" for name in (*_SIZES.values(), *_NUMBERS, "target_num_layers")], positive, "checked where given"),
            ([f"--target_{name}" for name in _SIZES.values()], positive, "of the output (default: the source's)"),
            (["--pipeline-model-parallel-blocks"], _numbers, "layers of each source stage: checked where given"),
            (["--target-pipeline-model-parallel-blocks"], _numbers, "layers of each output stage"),
            (["--pipeline-generate-layer", "--tensor-generate-layer"], _numbers, "the ranks to write (default: all)")):
        for flag in flags:
            parser.add_argument(flag.replace("_", "-"), type=kind, required=kind is Path, help=what)
    parser.add_argument("--workers", type=positive, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--replicas", choices=[REFUSE, FIRST, MEAN], default=REFUSE,
                        help="what to take where ranks keep different copies (default: %(default)s)")
    for flag, what in (("--no-load-optim", "the weights alone"), ("--overwrite", "replace what the folder to make holds"),
                       ("--process-checkpoint", "does nothing here")):
        parser.add_argument(flag, action="store_true", help=what)
    return parser


def _repartition(args: argparse.Namespace, others: list[str]) -> int:
    there = {size: getattr(args, name) for size, name in _SIZES.items() if getattr(args, name)}
    source = frameworks.read(args.load, weights_only=True, sizes=there)
    _check(args, others, source)
    wanted = {size: getattr(args, f"target_{name}") or getattr(source.layout, size) for size, name in _SIZES.items()}
    without = not any((folder / megatron.OPTIMIZER_FILE).is_file() for folder in source.rank_folders.values())
    report = convert(Request(
        source=args.load, target=args.save, to="megatron", sizes=wanted, source_sizes=there,
        stage_layers=args.target_pipeline_model_parallel_blocks or (),
        source_stage_layers=args.pipeline_model_parallel_blocks or (),
        only_pp=_only(args.pipeline_generate_layer, source.layout.pp, wanted["pp"]),
        only_tp=_only(args.tensor_generate_layer, source.layout.tp, wanted["tp"]),
        weights_only=args.no_load_optim or without, replicas=args.replicas, workers=args.workers, overwrite=args.overwrite))
    notes = [f"{args.load}: no {megatron.OPTIMIZER_FILE} there: the weights alone"] if without else []
    print("\n".join([*notes, *([f"not needed: {brief(others)}"] if others else []), *report.lines]))
    return report.status


def _check(args: argparse.Namespace, others: list[str], source: Checkpoint) -> None:
    if unknown := [flag for flag in others if re.search("target|generate|parallel-(size|blocks)", flag)]:
        raise RefusedError(f"{brief(unknown)}: no such flag; --help lists those that there are")
    saved = args_of(next(iter(source.metas.values())))
    for name, number in ({name: saved.get(name) for name in _NUMBERS} | {"target_num_layers": source.num_layers}).items():
        if number not in (None, getattr(args, name) or number):
            raise RefusedError(f"{args.load}: --{name.replace('_', '-')} is {number} there and not {getattr(args, name)}; "
                               "leave it out")
    if not args.no_load_optim and any("fp32_from_fp16_params" in (m.get("optimizer") or ()) for m in source.metas.values()):
        raise RefusedError(f"{args.load}: its optimizer is not a distributed one; --no-load-optim leaves it behind")


def _only(named: tuple[int, ...] | None, source: int, target: int) -> frozenset[int]:
    """The ranks to write, empty for all."""
    if named is None or set(named) == set(range(source)):
        return frozenset()
    if source != target or not set(named) < set(range(source)):
        raise RefusedError(f"{','.join(map(str, named))}: no part of 0 to {source - 1}, or these are not the output's "
                           f"0 to {target - 1}: name all of the source's, or none")
    return frozenset(named)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
