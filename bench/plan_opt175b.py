"""Plans all of OPT-175B: what `parammap convert --to alpa --dry-run` needs for its 8 parts × 124 shards.

  python bench/plan_opt175b.py [--to alpa|alpa-training|metaseq] [--keep DIR] [FLAG …]

The files have the sizes and the shard metadata that the real ones have (tests/data/metaseq/opt175b), and no content: their
tensors are holes in sparse files. The dry run (read, plan, proof that each element is written once) is a process of its
own; its wall time and peak memory are printed beside the targets. Exit status 1 if one is missed. With --keep the files
are made in DIR and used again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.measure import run  # noqa: E402
from convert.containers import torch_zip  # noqa: E402
from convert.tensors import TensorSpec  # noqa: E402

METADATA = REPOSITORY / "tests" / "data" / "metaseq" / "opt175b" / "shard_metadata_part-5.json"
PARTS, SHARDS = 8, 124
MAX_SECONDS, MAX_BYTES = 30, 1_000_000_000


def make(folder: Path) -> None:
    """Write the checkpoint. Its parts differ in no size, so that all have the metadata of part 5."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = json.loads(METADATA.read_text())
    for shard in range(SHARDS):
        tree = _shard(raw, shard)
        for part in range(PARTS):
            _write_sparse(folder / f"checkpoint_last-model_part-{part}-shard{shard}.pt", tree)


def _shard(raw: dict, shard: int) -> dict:
    entries = [{**entry, "params": {key: {**param, "padding": _padding(param, shard)}
                                    for key, param in entry["params"].items()}} for entry in raw["entries"]]
    names = {".".join(filter(None, (entry["fsdp_path"], key))): _chunk(param)
             for entry in entries for key, param in entry["params"].items()}
    model = {name: TensorSpec(name, "float16", (numel,)) for name, numel in names.items()}
    model["decoder.version"] = TensorSpec("decoder.version", "float16", (1,))
    return {"model": model, "shard_metadata": {"param_metadata": entries, "buffer_names": raw["buffer_names"]}}


def _chunk(param: dict) -> int:
    return -(-sum(param["numels"]) // SHARDS)


def _padding(param: dict, shard: int) -> int:
    return min(_chunk(param), max(0, (shard + 1) * _chunk(param) - sum(param["numels"])))


def _write_sparse(path: Path, tree: dict) -> None:
    """A file of torch.save's form whose tensors are holes."""
    with open(path, "wb") as file:
        for segment in torch_zip.frame(tree, path.name).segments:
            if hasattr(segment, "data"):
                file.write(segment.data)
            else:
                file.seek(segment.nbytes, os.SEEK_CUR)


def measure(source: Path, flags: list[str]) -> bool:
    """Print what the dry run takes; whether that is within the targets."""
    sizes = [path.stat() for path in source.glob("*.pt")]
    print(f"{len(sizes)} files of {sum(size.st_size for size in sizes) / 1e9:.1f} GB that take "
          f"{sum(size.st_blocks for size in sizes) * 512 / 1e6:.0f} MB of disk; {' '.join(flags)}", flush=True)
    measured = run([sys.executable, "-m", "convert", "convert", str(source), str(source.with_name("out")), "--dry-run",
                    *flags], REPOSITORY, sample_memory=True)
    print(measured.output.strip().splitlines()[-1])
    within = measured.wall <= MAX_SECONDS and measured.peak_bytes <= MAX_BYTES
    print(f"{measured.wall:.1f} s (target {MAX_SECONDS}), peak memory {measured.peak_bytes / 1e6:.0f} MB (target "
          f"{MAX_BYTES / 1e6:.0f}), processor time {measured.cpu:.1f} s on {os.cpu_count()} cores, of which others took "
          f"{measured.others_cpu / measured.wall:.1f}: {'within' if within else 'MISSED'}", flush=True)
    return within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", default="alpa", help="the framework to plan for (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to keep the made files (default: nowhere)")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = (args.keep or Path(scratch)) / "opt175b"
        if len(list(source.glob("*.pt"))) < PARTS * SHARDS:
            started = time.monotonic()
            make(source)
            print(f"made in {time.monotonic() - started:.0f} s", file=sys.stderr)
        return 0 if measure(source, ["--to", args.to, *flags]) else 1


if __name__ == "__main__":
    sys.exit(main())
