"""`convert_pt2ckpt.py`, with the flags that users of MindSpeed-Core-MS's tool of that name know.

The sizes describe the source: one that is given is checked against the checkpoint. --dp-size and
--cp-size number the rank folders of the output, as they always did."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parammap.cli import running
from parammap.cli.main import run
from parammap.errors import RefusedError
from parammap.frameworks.flags import positive
from parammap.frameworks.mindspore import target as mindspore
from parammap.job.request import Request
from parammap.tensors.layout import RANK_ORDER
from parammap.tensors.logical import MAIN_PARAM

_STATES = ("param", "exp_avg", "exp_avg_sq")
_SIZES = {"pp_size": "pp", "tp_size": "tp", "dp_size": "dp", "cp_size": "cp", "vpp_size": "vpp"}


def main(argv: Sequence[str] | None = None) -> int:
    parser, checked = running.script_parser(__doc__), "checked against the checkpoint where given"
    add = parser.add_argument
    add("--megatron-path", type=Path, required=True, help="an iteration folder, with mp_rank_*")
    add("--ms-path", type=Path, required=True, help="the folder to make")
    add("--param-map-path", type=Path, help="where param_map*.json or layout_*.json are")
    for flag in (*_SIZES, "num_layers"):
        add(f"--{flag.replace('_', '-')}", type=positive, help=checked)
    add("--parallel-init-order", default=RANK_ORDER, choices=[RANK_ORDER])
    add("--stage-list", type=int, nargs="+", help=f"layers of each pipeline stage, {checked}")
    add("--generate-all-dp-cp", action="store_true", help="a file, or a hard link, for every rank")
    add("--convert-param-only", action="store_true", help="the model's weights alone, as Float32")
    add("--file-prefix", default="network")
    add("--format", default="ckpt", choices=["ckpt", "safetensors"])
    add("--dist-opt-content", nargs="+", default=_STATES, help="states of distrib_optim.pt")
    add("--debug", action="store_true", help="print every output tensor")
    running.add_process_flags(parser, 4)
    return run(lambda: _convert(parser.parse_args(argv)))


def _convert(args: argparse.Namespace) -> int:
    if not args.convert_param_only and args.param_map_path is None:
        raise RefusedError("--param-map-path: name its folder, or give --convert-param-only")
    sizes = {size: n for flag, size in _SIZES.items() if (n := getattr(args, flag)) is not None}
    options = mindspore.Options(
        format=args.format,
        file_prefix=args.file_prefix,
        states=tuple(MAIN_PARAM if one == "param" else one for one in args.dist_opt_content),
        dtype="float32" if args.convert_param_only else None,
        generate_all_dp_cp=args.generate_all_dp_cp,
    )
    return running.convert(
        Request(
            source=args.megatron_path,
            target=args.ms_path,
            to="mindspore",
            source_sizes=sizes,
            sizes={size: value for size, value in sizes.items() if size in ("dp", "cp")},
            source_stage_layers=tuple(args.stage_list or ()),
            num_layers=args.num_layers,
            options=options,
            sidecar=args.param_map_path,
            weights_only=args.convert_param_only,
            verbose=args.debug,
            **running.how_by_process_flags(args),
        ),
        args.ms_path,
    )


if __name__ == "__main__":
    sys.exit(main())
