"""Makes the benchmark's input: a Megatron-LM checkpoint of a GPT at tp 2 · pp 2 with random values,
of the size asked for.

The files are those of bench/megatron_save.py. Values that ranks hold in common are equal on them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import zlib
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench import megatron_save  # noqa: E402
from bench.megatron_save import STATES, WHOLE, Buffer, Grid, Model, Rank, parameters  # noqa: E402

GRID = Grid(tp=2, pp=2)
BYTES_PER_PARAMETER = 4 * len(STATES)
#: power and factor of the normal distribution that a state's values have
_SCALE = {"param": (1, 0.02), "exp_avg": (1, 1e-4), "exp_avg_sq": (2, 1e-4)}


def model_of(nbytes: int) -> Model:
    """A model whose optimizer files hold about `nbytes` in all: four fifths in layers, the
    vocabulary fills up."""
    hidden = 1024 if nbytes >= 500_000_000 else 256
    wanted = nbytes // BYTES_PER_PARAMETER
    layers = max(2, int(0.8 * wanted / (12 * hidden * hidden)) // GRID.pp * GRID.pp)
    rest = wanted - _numel(Model(layers, hidden, hidden // 64, 0, hidden))
    granule = 128 * GRID.tp
    return Model(
        layers, hidden, hidden // 64, max(1, round(rest / (2 * hidden) / granule)) * granule, hidden
    )


def _numel(model: Model) -> int:
    return GRID.tp * sum(
        parameter.numel for pp in range(GRID.pp) for parameter in parameters(model, GRID, pp, 0)
    )


def make(nbytes: int, folder: Path) -> Path:
    """A save folder with about `nbytes` of optimizer files below `folder`, made at the first call
    and kept."""
    sources = b"".join(Path(file).read_bytes() for file in (__file__, megatron_save.__file__))
    name = f"megatron_tp{GRID.tp}pp{GRID.pp}_{nbytes / 1e9:g}GB_"
    target = folder / f"{name}{zlib.crc32(sources):08x}"
    if not target.is_dir():
        for old in folder.glob(f"{name}*"):
            shutil.rmtree(old)
        unfinished = target.with_suffix(".tmp")
        write(model_of(nbytes), unfinished)
        os.rename(unfinished, target)
    return target


def write(model: Model, save: Path) -> None:
    """Write the checkpoint of `model` as save folder `save`."""
    megatron_save.write(model, GRID, save, values)


def values(state: str, rank: Rank, buffer: Buffer) -> torch.Tensor:
    """A state's padded buffer, float32 [numel]. What ranks hold in common, and the tied embedding,
    is equal on them."""
    filled = torch.zeros(buffer.numel)
    power, scale = _SCALE[state]
    for slot in buffer.slots:
        whose = (
            "tied" if slot.parameter.tied else slot.parameter.name,
            state,
            rank.tp if slot.parameter.partition_dim != WHOLE else None,
        )
        generator = torch.Generator().manual_seed(zlib.crc32(repr(whose).encode()))
        filled[slot.start : slot.end].normal_(generator=generator).mul_(scale).pow_(power)
    return filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where the checkpoint's save folder goes")
    parser.add_argument(
        "--gigabytes",
        type=float,
        default=1.0,
        help="size of the optimizer files (default: %(default)s)",
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print(make(int(args.gigabytes * 1e9), args.folder))


if __name__ == "__main__":
    main()
