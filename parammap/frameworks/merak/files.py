"""Merak's folders and files: which rank's file is where, in the schemes of all its releases.

    <root>/latest_checkpointed_iteration.txt                 a number, or `release`
    <root>/<name>/mp_rank_TT_pp_rank_PPP/partial_model_optim.pt    pp > 1
    <root>/<name>/mp_rank_TT/partial_model_optim.pt                pp 1, tp > 1
    <root>/iter_NNNNNNN_all_dp/model_optim.pt                      tp 1, pp 1 (from v2.2.2 on <root>/<name>/model_optim.pt)
    <root>/<name>/zero_dp_rank_D[_mp_rank_T][_pp_rank_P]_opt_states.pt   ZeRO-1; numbers padded with zeros from v2.2.2 on

<name> is iter_NNNNNNN, release or best_model; the runtime's <root> is <output_dir>/<date>_ckpt, or
best_ckpt. Adapters have `lora_` before the name of the file.

Sources: Merak d72efe5 (Merak/utils/checkpoint.py, get_checkpoint_name) and v2.2.2
(Merak/core/checkpoint/utils.py)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from parammap.checkpoint import trackers
from parammap.checkpoint.trackers import RELEASE
from parammap.errors import RefusedError
from parammap.tensors import grid
from parammap.tensors.layout import Place

TRACKER, BEST = "latest_checkpointed_iteration.txt", "best_model"
WHOLE_FILE, PART_FILE = "model_optim.pt", "partial_model_optim.pt"
_RANK = re.compile(r"mp_rank_(\d+)(?:_pp_rank_(\d+))?")
_ZERO = re.compile(r"zero_dp_rank_(\d+)(?:_mp_rank_(\d+))?(?:_pp_rank_(\d+))?_opt_states\.pt")
_NAME = re.compile(r"iter_(\d{7,})(?:_all_dp)?|release|best_model")
_RUN = re.compile(r"(\d{4}-\d{2}-\d{2}|best)_ckpt")
_LORA = "lora_"


@dataclass(frozen=True, slots=True)
class MerakFiles:
    """An iteration's folder: its number (0 if its name has none), each rank's model file, and its
    optimizer files by dp rank."""

    folder: Path
    iteration: int
    models: dict[Place, Path]
    optimizers: dict[Place, list[Path]]


def recognizes(source: Path) -> bool:
    """Whether a folder is Merak's: an iteration's, a root, or a run's output folder."""
    return source.is_dir() and bool(_models(source) or _adapters(source) or _within(source))


def _within(source: Path) -> list[Path]:
    """The iterations in a root, or the roots in an output folder."""
    inner = [path for path in sorted(source.iterdir()) if path.is_dir()]
    return [
        path
        for path in inner
        if (_NAME.fullmatch(path.name) and (_models(path) or _adapters(path)))
        or (_RUN.fullmatch(path.name) and _within(path))
    ]


def find(source: Path, iteration: int | None = None) -> MerakFiles:
    """The files of the iteration that SRC names, or of the one that its tracker names.

    Raises RefusedError if there is none, if SRC holds several runs, and for a rank or an optimizer
    file that is missing."""
    folder = _folder(source, iteration)
    match = _NAME.fullmatch(folder.name)
    models = _models(folder)
    if not models:
        adapters = _adapters(folder)
        what = (
            f"holds a LoRA adapter ({adapters[0].name}), which is no model"
            if adapters
            else f"holds neither {WHOLE_FILE} nor mp_rank_*/{PART_FILE}"
        )
        raise RefusedError(f"{folder}: {what}; name the folder of the whole model")
    _check_grid(folder, models)
    return MerakFiles(
        folder, int(match.group(1) or 0) if match else 0, models, _optimizers(folder, models)
    )


def _folder(source: Path, iteration: int | None) -> Path:
    if not source.is_dir():
        raise RefusedError(
            f"{source}: no such folder; name a folder of checkpoints or one of its iter_NNNNNNN "
            f"folders"
        )
    if _models(source) or _adapters(source):
        return source
    runs = [path for path in _within(source) if _RUN.fullmatch(path.name)]
    if len(runs) > 1:
        raise RefusedError(
            f"{source}: holds {len(runs)} runs: {', '.join(path.name for path in runs)}; name one "
            f"of them"
        )
    root = runs[0] if runs else source
    name = _tracked(root) if iteration is None else f"iter_{iteration:07d}"
    first_of_release = f"iter_{0:07d}" if name == RELEASE else name
    names = [
        name,
        f"{first_of_release}_all_dp",
        *([BEST] if iteration is None and root.name == "best_ckpt" else []),
    ]
    there = [root / one for one in names if (root / one).is_dir()]
    if not there:
        raise RefusedError(
            f"{root / name}: no such folder; choose another iteration with --iteration"
        )
    return there[0]


def _tracked(root: Path) -> str:
    tracker = root / TRACKER
    if not tracker.is_file():
        inner = _within(root)
        if len(inner) == 1:
            return inner[0].name
        raise RefusedError(
            f"{tracker}: missing; choose an iteration with --iteration, or name its folder"
        )
    return trackers.iteration_folder(tracker)


def _models(folder: Path) -> dict[Place, Path]:
    if (folder / WHOLE_FILE).is_file():
        return {Place(): folder / WHOLE_FILE}
    ranks = {
        Place(int(match[1]), int(match[2] or 0)): path / PART_FILE
        for path in sorted(folder.iterdir())
        if path.is_dir() and (match := _RANK.fullmatch(path.name))
    }
    return ranks if any(path.is_file() for path in ranks.values()) else {}


def _adapters(folder: Path) -> list[Path]:
    return sorted(
        [*folder.glob(f"{_LORA}{WHOLE_FILE}"), *folder.glob(f"mp_rank_*/{_LORA}{PART_FILE}")]
    )


def _check_grid(folder: Path, models: dict[Place, Path]) -> None:
    tp, pp = (
        1 + max(numbers)
        for numbers in zip(*((place.tp, place.pp) for place in models), strict=True)
    )
    forms = {"_pp_rank_" in path.parent.name for path in models.values()}
    if len(forms) > 1:
        raise RefusedError(
            f"{folder}: has mp_rank_TT and mp_rank_TT_pp_rank_PPP side by side; these are of "
            f"different runs"
        )
    for place in (Place(t, p) for t in range(tp) for p in range(pp)):
        if place not in models:
            raise RefusedError(
                f"{folder}: rank tp{place.tp} pp{place.pp} is missing of tp {tp} · pp {pp}; copy "
                f"the whole "
                "checkpoint"
            )
        if not models[place].is_file():
            raise RefusedError(f"{models[place]}: missing; copy the whole checkpoint")


def _optimizers(folder: Path, models: dict[Place, Path]) -> dict[Place, list[Path]]:
    """Each rank's ZeRO-1 files in the order of their dp ranks; {} if there are none."""
    found: dict[Place, dict[int, Path]] = {}
    for name in sorted(os.listdir(folder)):
        if match := _ZERO.fullmatch(name):
            dp, tp, pp = (int(number or 0) for number in match.groups())
            found.setdefault(Place(tp, pp), {})[dp] = folder / name
    if not found:
        return {}
    dp = 1 + max(number for ranks in found.values() for number in ranks)
    for place in models:
        there = {(number,) for number in found.get(place, {})}
        if missing := grid.missing(there, [range(dp)]):
            raise RefusedError(
                f"{folder}: the optimizer file of dp rank {missing[1][0]} of tp{place.tp} "
                f"pp{place.pp} is "
                "missing; copy the whole checkpoint"
            )
    return {place: [found[place][number] for number in range(dp)] for place in models}
