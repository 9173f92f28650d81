"""Compares the benchmark's made-up checkpoint with one that Megatron-LM saved: same buffers, names,
dtypes, structure.

`python bench/check_input.py GOLDEN`: GOLDEN is the iteration folder of a tp 2 · pp 2 GPT of
Megatron-LM core 0.8 … 0.17 with tied embeddings (in tests/data/megatron:
core_r0.12.0_repo_mcore_tp2pp2_hook/iter_0000002)."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.make_checkpoint import Model, write  # noqa: E402
from parammap.formats import torch_zip  # noqa: E402
from parammap.formats.pickles import Opaque  # noqa: E402
from parammap.tensors.logical import Stored  # noqa: E402

#: what the made-up model file leaves out: it is no tensor, and the converter takes nothing from it
LEFT_OUT = {"rerun_state_machine"}


def differences(golden: Path, made: Path) -> list[str]:
    """Every way in which the four ranks' files in the two iteration folders differ, but for values
    and arguments."""
    found = []
    for rank in sorted(path.name for path in golden.glob("mp_rank_*")):
        for file in ("distrib_optim.pt", "model_optim_rng.pt"):
            theirs, ours = (torch_zip.read(folder / rank / file) for folder in (golden, made))
            found += _differ(f"{rank}/{file}", _shape(theirs), _shape(ours))
        _, tp, pp = rank.rsplit("_", 2)
        layout = json.loads((made / "param_map" / f"layout_tp{tp}_pp{pp}.json").read_text())
        buffers = json.loads((golden / rank / "param_map.json").read_text())["optimizers"][0]
        found += _differ(f"{rank}: layout", _prototype(buffers), _of_layout(layout))
    return found


def _prototype(buffers: list[dict]) -> list:
    """The golden's buffers, recorded by the prototype of the hook."""
    return [
        [
            b["numel"],
            [
                [*bounds, n]
                for bounds, n in zip(b["bucket_indices"], b["numel_unpadded"], strict=True)
            ],
            [[p["name"], p["shape"], p["start"], p["end"], p["bucket"]] for p in b["params"]],
        ]
        for b in buffers
    ]


def _of_layout(layout: dict) -> list:
    return [
        [
            b["numel"],
            [[k["start"], k["end"], k["numel_unpadded"]] for k in b["buckets"]],
            [[p["name"], p["shape"], p["start"], p["end"], p["bucket"]] for p in b["params"]],
        ]
        for b in layout["optimizers"][0]["buffers"]
    ]


def _shape(value: object) -> object:
    """A value without its numbers: keys and order, tensors as dtype, shape and distance from the
    file's first one."""
    first = min((s.extents[0].offset for s in _tensors(value)), default=0)
    return _shape_from(value, first)


def _tensors(value: object):
    if isinstance(value, Stored):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _shape_from(value: object, first: int) -> object:
    if isinstance(value, Stored):
        numbered = value.dtype != "uint8"
        return value.dtype, value.shape, value.extents[0].offset - first if numbered else None
    if isinstance(value, dict):
        return {
            str(key): _shape_from(item, first)
            for key, item in value.items()
            if key not in LEFT_OUT and not str(key).endswith("_extra_state")
        }
    if isinstance(value, list):
        return [_shape_from(item, first) for item in value]
    return value.target.name if isinstance(value, Opaque) else type(value).__name__


def _differ(where: str, theirs: object, ours: object) -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = (
            [f"{where}: keys {list(theirs)} and {list(ours)}"] if list(theirs) != list(ours) else []
        )
        return keys + [
            line
            for key in theirs
            if key in ours
            for line in _differ(f"{where} {key}", theirs[key], ours[key])
        ]
    return [] if theirs == ours else [f"{where}: {theirs} and {ours}"]


def main() -> int:
    golden = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "save"
        write(
            Model(layers=2, hidden=128, heads=4, vocab=128, positions=32, bucket_size=20_000), made
        )
        found = differences(golden, next(made.glob("iter_*")))
    print("\n".join(found) or f"{golden}: the benchmark's input has the same structure")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
