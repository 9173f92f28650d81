"""The benchmark for OPT: metaseq's FSDP shards to Alpa's numpy folder, beside `cp -r` and
resharding and gluing with torch.

  python bench/metaseq.py [--runs N] [--folder DIR]

The input is a model of 305 million parameters in fp16, 2 parts × 4 shards, in the form that
metaseq's published files have. All sides take turns, find their input in the page cache, and make
what they wrote durable. A first round, which does not count, measures memory and compares the
results byte for byte. The report on standard output is Markdown. Exit status 1 if a target is
missed."""

from __future__ import annotations

import argparse
import filecmp
import math
import os
import shutil
import sys
import zlib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.rounds import COPY, PARAMMAP, Series, circumstances, convert, copy, table, take_turn  # noqa: E402

PARTS, SHARDS = 2, 4
SIZES = {"layers": 20, "hidden": 1024, "ffn": 4096, "heads": 16, "vocab": 50272, "positions": 2050}
TODAY = "torch: reshard, glue, np.save"


# --------------------------------------------------------------------------------------------------------------
# the input


def source_in(folder: Path) -> Path:
    """The checkpoint, made at the first call and kept."""
    target = folder / f"metaseq_{PARTS}x{SHARDS}_{zlib.crc32(Path(__file__).read_bytes()):08x}"
    if not target.is_dir():
        for old in folder.glob(f"metaseq_{PARTS}x{SHARDS}_*"):
            shutil.rmtree(old)
        unfinished = target.with_suffix(".tmp")
        unfinished.mkdir(parents=True)
        for part in range(PARTS):
            _write_part(part, unfinished)
        os.rename(unfinished, target)
    return target


def _write_part(part: int, folder: Path) -> None:
    """The shards of a part, each layer and the rest an FSDP module of its own (metaseq, main
    f7ffa5f)."""
    import torch

    from tests.support import fsdp

    model = fsdp.decoder(fsdp.Options("", parts=PARTS, **SIZES), part, lambda module: module)
    modules = {
        "": (
            "decoder.",
            [
                (name, one)
                for name, one in model.named_parameters()
                if not name.startswith("layers.")
            ],
        )
    }
    for number, layer in enumerate(model.layers):
        modules[f"decoder.layers.{number}"] = "", list(layer.named_parameters())
    for shard in range(SHARDS):
        tensors, metadata = {}, []
        for path, (prefix, named) in modules.items():
            flat = torch.cat([one.detach().flatten() for _, one in named]).half()
            chunk = math.ceil(flat.numel() / SHARDS)
            own = flat[shard * chunk : (shard + 1) * chunk]
            params = {
                "names": [prefix + name for name, _ in named],
                "shapes": [one.shape for _, one in named],
                "numels": [one.numel() for _, one in named],
                "padding": chunk - own.numel(),
            }
            tensors[f"{path}.flat_param_0".lstrip(".")] = torch.nn.functional.pad(
                own, (0, params["padding"])
            ).clone()
            metadata.append(
                {
                    "fsdp_path": path,
                    "params": {"flat_param_0": params},
                    "no_broadcast_optim_state": False,
                    "shared_param_info": []
                    if path
                    else [("decoder.embed_tokens.weight", "decoder.output_projection.weight")],
                }
            )
        tensors["decoder.version"] = model.version.half()
        settings = argparse.Namespace(
            decoder_attention_heads=SIZES["heads"],
            activation_fn="relu",
            share_decoder_input_output_embed=True,
        )
        torch.save(
            {
                "cfg": {"common": {"model_parallel_size": PARTS}, "model": settings},
                "model": tensors,
                "criterion": None,
                "optimizer_history": [{"num_updates": 1}],
                "task_state": {},
                "extra_state": {},
                "shard_metadata": {"param_metadata": metadata, "buffer_names": ["decoder.version"]},
            },
            folder / f"checkpoint_last-model_part-{part}-shard{shard}.pt",
        )


# -------------------------------------------------------------------------------------------------------------
# the rounds

#: as users run them: three programs, files in between
_TODAY = (
    'mkdir "$3" && "$0" "$1" reshard "$2" "$3" && "$0" "$1" glue "$2" "$3" && '
    '"$0" "$1" numpy "$3" "$4"; status=$?; rm -r "$3"; exit $status'
)


def _today(source: Path, target: Path) -> list[str]:
    return [
        "sh",
        "-c",
        _TODAY,
        sys.executable,
        "bench/metaseq_baseline.py",
        str(source),
        f"{target}.between",
        str(target),
    ]


def _convert(source: Path, target: Path) -> list[str]:
    return convert(source, target, "alpa")


SUBJECTS = {COPY: copy, PARAMMAP: _convert, TODAY: _today}


def measure(source: Path, folder: Path, runs: int) -> dict[str, Series]:
    """All subjects, turn about; the first round compares what they wrote."""
    results = {subject: folder / f"out_{number}" for number, subject in enumerate(SUBJECTS)}
    commands = {subject: SUBJECTS[subject](source, target) for subject, target in results.items()}
    series = {
        subject: Series.begun(commands[subject], source, target)
        for subject, target in results.items()
    }
    _check_same(results[PARAMMAP], results[TODAY])
    for number in range(runs):
        for subject, target in results.items():
            series[subject].runs.append(take_turn(commands[subject], source, target))
            print(
                f"round {number + 1}  {subject:32} {series[subject].runs[-1].wall:6.2f} s",
                file=sys.stderr,
                flush=True,
            )
    for target in results.values():
        shutil.rmtree(target)
    return series


def _check_same(ours: Path, theirs: Path) -> None:
    names = sorted(path.name for path in theirs.iterdir())
    _, wrong, missing = filecmp.cmpfiles(ours, theirs, names, shallow=False)
    surplus = {path.name for path in ours.glob("decoder.*")} - set(names)
    if wrong or missing or surplus or not names:
        sys.exit(
            f"bench: the folders differ in {[*wrong, *missing, *sorted(surplus)][:4]}; their times "
            f"cannot be compared"
        )


def report(series: dict[str, Series]) -> tuple[list[str], bool]:
    """The tables, and whether all targets are met."""
    lines = table([""], (((subject,), one) for subject, one in series.items()))
    ours, copied, today = series[PARAMMAP], series[COPY].wall, series[TODAY].wall
    targets = [
        ("parammap's wall time in cp's", "≤ 1.5", ours.wall / copied, ours.wall <= 1.5 * copied),
        ("times faster than torch", "≥ 10", today / ours.wall, today >= 10 * ours.wall),
        ("parammap's peak memory, MB", "≤ 150", ours.peak_bytes / 1e6, ours.peak_bytes <= 150e6),
    ]
    lines += [
        "",
        "| | target | |",
        "|---|---|---|",
        *(
            f"| {name} | {target} | {value:.4g}{'' if met else ', missed'} |"
            for name, target, value, met in targets
        ),
    ]
    lines += ["", circumstances(series.values())]
    return lines, all(met for *_, met in targets)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--runs", type=int, default=5, help="counted runs of each side (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=REPOSITORY / ".cache" / "bench", help="where files are made"
    )
    args = parser.parse_args()
    lines, met = report(measure(source_in(args.folder), args.folder, args.runs))
    print("\n".join(lines))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
