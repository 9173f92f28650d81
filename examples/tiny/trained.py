"""A training run as a folder that is made once: found again by its options and by the sources that
made it.

Needs neither torch nor megatron, so that tests and the demo can read the truth without them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from examples.fetch_core import CACHE, publish
from examples.tiny.options import command_line

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("examples/train_tiny.py", "examples/tiny/*.py", "examples/cpu_shim/*.py", "hooks/*.py")
#: a run takes some seconds; ranks that wait for one another do so for half an hour
TIMEOUT_S = 600
STAMP = "truth/trained.json"
#: of a run's folder; file systems take 255 bytes, and a partial one's name is longer
LONGEST_NAME = 200


@dataclass(frozen=True)
class Truth:
    """The live state of one rank of tp, pp and ep, as tiny/live_state.py wrote it; arrays in the
    rank's own shapes."""

    file: Path

    @cached_property
    def _npz(self) -> Any:
        return np.load(self.file)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """release (`core`), args, place, layers (global numbers by chunk), params, param_groups,
        scheduler, buffers."""
        return json.loads(str(self._npz["meta"]))

    @property
    def place(self) -> tuple[int, int, int]:
        """(tp rank, pp rank, ep rank)"""
        return tuple(self.meta["place"][axis] for axis in ("tp", "pp", "ep"))

    def names(self, chunk: int | None = None) -> Iterator[tuple[int, str]]:
        """(chunk, name in the checkpoint) of every parameter, or of those of one chunk."""
        for key in self.meta["params"]:
            index, name = key.split("/", 1)
            if chunk in (None, int(index)):
                yield int(index), name

    def array(self, chunk: int, name: str, role: str) -> np.ndarray:
        """`role`: weight (bf16 as uint16), main, exp_avg or exp_avg_sq (fp32)."""
        return self._npz[f"{chunk}/{name}/{role}"]


@dataclass(frozen=True)
class Trained:
    """A save root as Megatron leaves it, with the truth beside it."""

    path: Path

    @property
    def iteration(self) -> int:
        return int((self.path / "latest_checkpointed_iteration.txt").read_text())

    @property
    def iteration_folder(self) -> Path:
        return self.path / f"iter_{self.iteration:07}"

    def truths(self) -> list[Truth]:
        """One per model file, in the order of tp, pp, ep. Raises FileNotFoundError where there is
        none."""
        files = sorted((self.path / "truth").glob("tp*.npz"))
        if not files:
            raise FileNotFoundError(f"{self.path / 'truth'}: no live state was written there")
        return [Truth(file) for file in files]

    def rank_folder(self, truth: Truth) -> Path:
        """mp_rank_TT[_PPP][_EEE] that belongs to a truth."""
        tp, pp, ep = truth.place
        args = truth.meta["args"]
        name = f"mp_rank_{tp:02}"
        name += f"_{pp:03}" if args["pipeline_model_parallel_size"] > 1 else ""
        name += f"_{ep:03}" if args["expert_model_parallel_size"] > 1 else ""
        return self.iteration_folder / name


def train_cached(options: dict[str, Any]) -> Trained:
    """The run with those options of train_tiny.py, from .cache/trained or made now."""
    name = "-".join(word.removeprefix("--") for word in command_line(options))
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return train_into(CACHE / "trained" / name, options)


def train_into(folder: Path, options: dict[str, Any]) -> Trained:
    """The run in a folder of the caller's choice: kept if it is this run and whole, made anew if it
    is another one.

    Raises SystemExit where the folder holds something else, RuntimeError with the end of the log
    where training fails, subprocess.TimeoutExpired where it hangs."""
    key = run_key(options)
    if is_intact(folder, key):
        return Trained(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / STAMP).exists():
        raise SystemExit(
            f"{folder} holds something else than a training run; choose another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        command = [
            sys.executable,
            "-W",
            "ignore",
            str(ROOT / "examples/train_tiny.py"),
            "--out",
            str(partial),
        ]
        log = subprocess.run(
            command + command_line(options), stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S
        )
        if log.returncode:
            raise RuntimeError(
                f"{' '.join(command_line(options))}: training failed\n{log.stderr[-3000:]}"
            )
        (partial / STAMP).write_text(
            json.dumps({"key": key, "options": options, "files": _digests(partial)}, indent=1)
        )
        if not is_intact(folder, key):  # another process may have made the same run meanwhile
            shutil.rmtree(folder, ignore_errors=True)
            publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Trained(folder)


def run_key(options: dict[str, Any]) -> str:
    """Changes with the options and with any source that has a part in what is written."""
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for pattern in SOURCES:
        for file in sorted(ROOT.glob(pattern)):
            key.update(file.read_bytes())
    return key.hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / STAMP)
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def is_intact(folder: Path, key: str) -> bool:
    if not (folder / STAMP).is_file():
        return False
    stamp = json.loads((folder / STAMP).read_text())
    return stamp["key"] == key and stamp["files"] == _digests(folder)
