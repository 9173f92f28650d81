"""The files that patches/metaseq_param_map.patch writes beside each shard of a checkpoint
(hooks/metaseq_param_map.py): read, and made for shards that no run saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.formats import json_document
from parammap.formats.frames import Literal
from parammap.formats.json_schema import Check, compiled, opened
from parammap.formats.pickles import Opaque
from parammap.plan.plan import WantedFile
from parammap.tensors.layout import Place
from parammap.tensors.logical import Stored, TensorSpec

#: of a file, {} standing for its name without ending: what describes it (the second is a prototype's),
#: and all that there may be
_LAYOUTS = ("layout_{}.json", "param_map_{}.json")
FILES = (*_LAYOUTS, "args_{}.json")


def sidecar_of(file: Path, folder: Path | None, num_updates: int | None) -> dict[str, Any] | None:
    """The sidecar of a shard file, in `folder` or else in param_map beside it; None if there is
    none of this very save.

    Raises RefusedError if the one in a folder that was named is of another save.
    """
    file = file.resolve()
    # an upload renames checkpoint_N-….pt to checkpoint_N/checkpoint-….pt (metaseq, trainer.py,
    # cloud_upload_path)
    stems = (file.stem, file.parent.name + file.stem.removeprefix("checkpoint"))
    for path in (
        place / form.format(stem)
        for place in ([folder] if folder else [file.parent / "param_map"])
        for stem in stems
        for form in _LAYOUTS
    ):
        if path.is_file():
            sidecar = read(path)
            if num_updates in (None, sidecar.get("num_updates")):
                return sidecar
            if folder:
                raise RefusedError(
                    f"{path}: is of update {sidecar.get('num_updates')} and {file.name} of "
                    f"{num_updates}; name the right folder with --sidecar"
                )
    return None


@cache
def _is_sidecar() -> Check:
    """The check of a sidecar; a prototype's does not say its schema, version and framework."""
    form = opened(json_document.schema("metaseq"))
    form["required"] = ["file"]
    return compiled(form)


def read(path: Path) -> dict[str, Any]:
    """Raises RefusedError for what is no sidecar of metaseq."""
    content: dict[str, Any] = json_document.read(
        path, _is_sidecar(), "name the folder of the checkpoint's own sidecars with --sidecar"
    )
    return content


def files(
    target: Checkpoint, part: int, shard: int, shards: int, path: PurePath, tree: dict[str, Any]
) -> Iterator[WantedFile]:
    """The sidecar of the file `path`, which holds the tree: shard `shard` of `shards`."""
    meta = target.rank_metadata[part, 0, 0]
    state = tree.get("last_optimizer_state", {}).get("state", {})
    index = meta["optimizer_index"] if state else {}
    layout = {
        "schema": "parammap.metaseq",
        "version": 1,
        "framework": {"name": "metaseq", "fairscale_version": None, "torch_version": None},
        "file": path.name,
        "num_updates": target.iteration,
        "model_part": part,
        "shard": shard,
        "model_parallel_size": target.layout.tp,
        "data_parallel_size": shards,
        "shard_metadata": tree["shard_metadata"],
        "model": tree["model"],
        "optimizer_index": {str(number): index[number] for number in state},
        "optimizer": state,
    }
    contents = {f"layout_{path.stem}.json": layout}
    if shard == 0 and meta.get("cfg") is not None:
        contents[f"args_{path.stem}.json"] = {"cfg": meta["cfg"]}
    for name, content in contents.items():
        data = json.dumps(_plain(content), separators=(",", ":")).encode()
        yield WantedFile(str(path.parent / "param_map" / name), (Literal(data),), (), Place(part))


def _plain(tree: object) -> object:
    """The tree as JSON has it: tensors as dtype and shape, objects as their attributes."""
    if isinstance(tree, (TensorSpec, Stored)):
        return {"dtype": tree.dtype, "shape": list(tree.shape)}
    if isinstance(tree, dict):
        return {str(key): _plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple, set, frozenset)):
        return [_plain(value) for value in tree]
    if isinstance(tree, Opaque):
        return _plain(tree.attributes or dict(tree.pairs) or tree.items or str(tree.target))
    return tree if isinstance(tree, (str, int, float, bool, type(None))) else str(tree)
