"""`convert_pt2ckpt.py`, with the flags that users of MindSpeed-Core-MS's tool of that name know.

Here the sizes describe the source: one that is given is checked against the checkpoint, one that is
left out is taken from it; --dp-size and --cp-size number the rank folders of the output, as they
always did."""

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
from parammap.frameworks.mindspore.formats import FORMATS
from parammap.job.conversion import convert
from parammap.job.request import Request
from parammap.tensors.layout import RANK_ORDER
from parammap.tensors.logical import MAIN_PARAM

_SIZES = {"pp_size": "pp", "tp_size": "tp", "dp_size": "dp", "cp_size": "cp", "vpp_size": "vpp"}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return run(lambda: _convert(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--megatron-path",
        type=Path,
        required=True,
        help="an iteration folder, with its mp_rank_* folders",
    )
    add("--ms-path", type=Path, required=True, help="the folder to make")
    add("--param-map-path", type=Path, help="where param_map*.json or layout_*.json are")
    for flag in _SIZES:
        add(
            f"--{flag.replace('_', '-')}",
            type=positive,
            help="checked against the checkpoint where given",
        )
    add("--parallel-init-order", default=RANK_ORDER, choices=[RANK_ORDER])
    add(
        "--stage-list",
        type=int,
        nargs="+",
        help="layers of each pipeline stage, checked against the checkpoint",
    )
    add("--num-layers", type=positive, help="checked against the checkpoint where given")
    add(
        "--generate-all-dp-cp",
        action="store_true",
        help="a file for every rank, as hard links where possible",
    )
    add(
        "--convert-param-only",
        action="store_true",
        help="the weights of model_optim_rng.pt, as Float32",
    )
    add("--file-prefix", default="network")
    add("--format", default="ckpt", choices=sorted(FORMATS))
    add(
        "--dist-opt-content",
        nargs="+",
        default=["param", "exp_avg", "exp_avg_sq"],
        help="states of distrib_optim.pt",
    )
    add("--debug", action="store_true", help="print every output tensor")
    add("--multiprocess-off", action="store_true", help="work in this process alone")
    add("--process-limit", type=positive, default=4, help="worker processes (default: %(default)s)")
    add(
        "--process_timeout",
        type=positive,
        default=3600,
        help="seconds after which the run is given up",
    )
    return parser


def _convert(args: argparse.Namespace) -> int:
    if not args.convert_param_only and args.param_map_path is None:
        raise RefusedError(
            "--param-map-path: name the folder of the parameter maps, or give --convert-param-only"
        )
    states = tuple(MAIN_PARAM if state == "param" else state for state in args.dist_opt_content)
    sizes = {
        size: value for flag, size in _SIZES.items() if (value := getattr(args, flag)) is not None
    }
    report = convert(
        Request(
            source=args.megatron_path,
            target=args.ms_path,
            to="mindspore",
            source_sizes=sizes,
            sizes={size: value for size, value in sizes.items() if size in ("dp", "cp")},
            source_stage_layers=tuple(args.stage_list or ()),
            num_layers=args.num_layers,
            options=mindspore.Options(
                args.format,
                "mindspore",
                args.file_prefix,
                states,
                "float32" if args.convert_param_only else None,
                generate_all_dp_cp=args.generate_all_dp_cp,
            ),
            sidecar=args.param_map_path,
            weights_only=args.convert_param_only,
            verbose=args.debug,
            workers=1 if args.multiprocess_off else args.process_limit,
            timeout=args.process_timeout,
        )
    )
    return running.tell(report, args.ms_path)


if __name__ == "__main__":
    sys.exit(main())
