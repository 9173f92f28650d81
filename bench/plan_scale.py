"""Plans changes of layout at scale: what `parammap convert --dry-run` needs for a dense 175B model
and a mixture of 1T.

  python bench/plan_scale.py [--model 175B|1T] [--keep DIR]

For each model it makes a save folder as Megatron-LM would have left it (bench/megatron_save.py),
whose tensors are holes in sparse files (torch.serialization.skip_data), so that terabytes take
megabytes of disk; then it runs the whole of the dry run (read, plan, proof that each element is
written once) in a process of its own and prints its wall time and peak memory beside the targets.
Exit status 1 if one is missed. With --keep the folders are kept in DIR and used again."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench import megatron_save  # noqa: E402
from bench.measure import plan  # noqa: E402
from bench.megatron_save import Buffer, Grid, Model, Rank, parameters  # noqa: E402

MAX_SECONDS, MAX_BYTES = 60, 2_000_000_000


@dataclass(frozen=True, slots=True)
class Case:
    """A model, the layout it was saved in, and the flags that ask for another."""

    model: Model
    grid: Grid
    flags: tuple[str, ...]

    def numel(self) -> int:
        """The model's parameters, the tied embedding counted on both stages that hold it."""
        once = Grid(1, self.grid.pp, self.grid.vpp, stage_layers=self.grid.stage_layers)
        return sum(
            parameter.numel
            for pp in range(once.pp)
            for vpp in range(once.vpp)
            for parameter in parameters(self.model, once, pp, vpp)
        )


#: 175B: the sizes of GPT-3 (arXiv:2005.14165, table 2.1); 1T: those of Kimi K2 (its model card),
#: but every layer a mixture without a shared expert, and grouped-query attention
CASES = {
    "175B": Case(
        Model(layers=96, hidden=12288, heads=96, ffn=49152, vocab=51200, positions=2048),
        Grid(tp=8, pp=16, dp=8),
        ("--tp", "4", "--pp", "8", "--vpp", "2"),
    ),
    "1T": Case(
        Model(
            layers=61,
            hidden=7168,
            heads=64,
            groups=8,
            kv_channels=128,
            ffn=2048,
            experts=384,
            vocab=163840,
            positions=4096,
        ),
        Grid(tp=1, pp=16, ep=64, dp=64, stage_layers=(*15 * (4,), 1)),
        ("--pp", "8", "--ep", "32", "--stage-layers", "8,8,8,8,8,8,8,5"),
    ),
}


def make(case: Case, save: Path) -> None:
    """Write the save folder, all tensors of which are holes."""
    fake = FakeTensorMode()

    def empty(_state: str, _rank: Rank, buffer: Buffer) -> torch.Tensor:
        with fake:
            return torch.empty(buffer.numel)

    with torch.serialization.skip_data(materialize_fake_tensors=True):
        megatron_save.write(case.model, case.grid, save, empty)


def measure(name: str, case: Case, folder: Path, flags: list[str]) -> bool:
    """Make what is not there yet, and plan; whether that was within the targets."""
    save = folder / name
    if not (save / "latest_checkpointed_iteration.txt").is_file():
        started = time.monotonic()
        make(case, save)
        print(f"made in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return plan(
        f"{name}, {case.numel() / 1e9:.0f}e9 parameters",
        save,
        ["--to", "megatron", *flags],
        MAX_SECONDS,
        MAX_BYTES,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--model", action="append", choices=CASES, help="which models (default: all)"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="where to keep the made folders (default: nowhere)"
    )
    parser.add_argument(
        "--same-layout", action="store_true", help="plan the layout as it is and not the change"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = [
            measure(
                name,
                CASES[name],
                args.keep or Path(scratch),
                [] if args.same_layout else list(CASES[name].flags),
            )
            for name in args.model or CASES
        ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
