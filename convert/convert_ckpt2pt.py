"""`convert_ckpt2pt.py`, with the flags that users of MindSpeed-Core-MS's tool of that name know.

The sizes describe the source: they are checked against what pt_meta records, and dp and cp number
the rank folders."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parammap.cli import running
from parammap.cli.main import run
from parammap.frameworks.flags import positive
from parammap.job.request import Request

_SIZES = {"dp_size": "dp", "cp_size": "cp", "tp_size": "tp", "pp_size": "pp", "vpp_size": "vpp"}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return run(lambda: _convert(args))


def _parser() -> argparse.ArgumentParser:
    parser = running.script_parser(__doc__)
    add = parser.add_argument
    add(
        "--num-layers",
        type=positive,
        required=True,
        help="layers of the model, with those of --noop",
    )
    for flag in _SIZES:
        add(f"--{flag.replace('_', '-')}", type=positive, required=True, help="of the source")
    add("--src-model-format", default="ckpt", choices=["ckpt", "safetensors"])
    add("--noop", type=int, nargs="+", default=[], help="layers that do nothing and are left out")
    add("--ms-path", type=Path, required=True, help="the folder with rank_N/")
    add("--param-map-path", type=Path, required=True, help="pt_meta of the conversion to MindSpore")
    add("--megatron-path", type=Path, required=True, help="the folder to make")
    add("--convert-param-only", action="store_true", help="the weights alone")
    running.add_process_flags(parser, 8)
    return parser


def _convert(args: argparse.Namespace) -> int:
    return running.convert(
        Request(
            source=args.ms_path,
            target=args.megatron_path,
            to="megatron",
            source_sizes={size: getattr(args, flag) for flag, size in _SIZES.items()},
            source_suffix=f".{args.src_model_format}",
            noop=frozenset(args.noop),
            num_layers=args.num_layers - len(set(args.noop)),
            sidecar=args.param_map_path,
            weights_only=args.convert_param_only,
            **running.how_by_process_flags(args),
        ),
        args.megatron_path,
    )


if __name__ == "__main__":
    sys.exit(main())
