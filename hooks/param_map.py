# SPDX-License-Identifier: Apache-2.0

"""Write the sidecars of a Megatron-LM save: the layout, and what tools older than it read.

Beside the layout (see param_layout) stand the maps of MindSpeed-Core-MS, `param_map_buffer*.json`,
and the arguments, `args*.pt` and `args*.json`. All of them get a second name in
`<save>/param_map/`, where those tools look for the latest save's.

The ParamMap project maintains this file, in hooks/; patches/param_map.patch adds it to Megatron-LM.
"""

import io
import os
import re
from collections import Counter
from typing import Any, Dict, Set, Tuple

import torch

from parammap.hooks.param_layout import (
    Model,
    RankLayout,
    describe_rank,
    layout_file,
    layout_folder,
    place,
)
from parammap.hooks.sidecar_files import (
    harmless,
    sync_in_background,
    to_json,
    to_plain,
    write_atomically,
    write_files,
)

CHECKPOINT_VERSION = 3.0  # what Megatron-LM's generate_state_dict() stores, core_r0.6.0 to main
#: key in the checkpoint of a legacy model's tied embedding on its last stage -> its name there
HEAD_KEY, HEAD_NAME = "word_embeddings_for_head.", "word_embeddings."
LATEST_FILES = ("param_map_buffer", "layout_tp", "args_tp")


@harmless
def save_param_map(
    args: Any,
    iteration: int,
    model: Model,
    optimizer: Any,
    checkpoint_name: str,
) -> None:
    """Write this rank's sidecars; takes what param_layout.save_param_layout() takes."""
    layout = describe_rank(args, iteration, model, optimizer, checkpoint_name)
    if layout is None:
        return
    files = {
        **_compatible_maps(layout),
        **_args_files(args, iteration, place(layout.content)),
        layout_file(layout.content): to_json(layout.content),  # last: all others stand before it
    }
    folder = layout_folder(layout.content, checkpoint_name)
    written = write_files(folder, files)
    latest = _latest_folder(layout.content, folder)
    os.makedirs(latest, exist_ok=True)
    _clear_stale(latest, set(files), layout.content)
    for name, content in files.items():
        _link_atomically(os.path.join(folder, name), os.path.join(latest, name), content)
    sync_in_background([*written, latest])


def _latest_folder(layout: Dict[str, Any], folder: str) -> str:
    parent = os.path.dirname(folder)
    if layout["checkpoint_format"] == "torch":
        return os.path.join(os.path.dirname(parent), "param_map")
    return parent


# Contents


def _compatible_maps(layout: RankLayout) -> Dict[str, bytes]:
    """The maps of MindSpeed-Core-MS r0.1.0: {name: [dtype, shape, start, end, bucket]}.

    One file per chunk and buffer; a chunk's dense buffers count first, then its expert buffers.
    """
    rank = layout.content["rank"]
    ep = f"ep{rank['ep']}" if layout.content["parallel"]["ep"] > 1 else ""
    known = [
        (described, written is not None)
        for described, written in zip(layout.optimizers, layout.content["optimizers"])
        if described is not None
    ]
    files: Dict[str, bytes] = {}
    counted: Dict[int, int] = Counter()
    for described, is_written in sorted(known, key=lambda entry: str(entry[0]["kind"])):
        for buffer in described["buffers"]:
            number, vpp = counted[buffer["chunk"]], buffer["chunk"]
            counted[vpp] += 1
            if is_written:
                name = f"param_map_buffer{number}_dp0tp{rank['tp']}pp{rank['pp']}vpp{vpp}{ep}.json"
                files[name] = to_json(dict(map(_compatible_entry, buffer["params"])))
    return files


def _compatible_entry(param: Dict[str, Any]) -> Tuple[str, Any]:
    where = [param[key] for key in ("start", "end", "bucket")]
    name = param["name"]
    if name.startswith(HEAD_KEY):
        name = HEAD_NAME + name[len(HEAD_KEY) :]
    return f"module.{name}", [f"torch.{param['dtype']}", param["shape"], *where]


def _args_files(args: Any, iteration: int, suffix: str) -> Dict[str, bytes]:
    if args is None:
        return {}
    content = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration}
    pickled = io.BytesIO()
    torch.save(content, pickled)
    plain = dict(content, args=to_plain(args))
    return {f"args{suffix}.pt": pickled.getvalue(), f"args{suffix}.json": to_json(plain)}


# The folder of the latest sidecars


def _clear_stale(folder: str, keep: Set[str], layout: Dict[str, Any]) -> None:
    """Take out of the folder what an earlier layout left there; other ranks may be writing to it.

    Each rank clears the files of its own place, global rank 0 those of places that this layout does
    not have. A map without a layout beside it came from another tool and may be its checkpoint's
    only one: it goes to `replaced/`.
    """
    parallel, rank = layout["parallel"], layout["rank"]
    names = set(os.listdir(folder))
    for name in names:
        if not name.startswith(LATEST_FILES):
            continue
        at = {axis: int(number) for axis, number in re.findall(r"(vpp|tp|pp|ep)(\d+)", name)}
        has_ep = ("ep" in at) == (parallel["ep"] > 1)
        fits = has_ep and all(at.get(axis, 0) < parallel[axis] for axis in ("tp", "pp", "ep"))
        is_here = all(at.get(axis, 0) == rank[axis] for axis in ("tp", "pp", "ep"))
        if not (is_here if fits else rank["global"] == 0):
            continue
        ep = f"_ep{at['ep']:03}" if "ep" in at else ""
        beside = f"layout_tp{at.get('tp', 0):02}_pp{at.get('pp', 0):03}{ep}.json"
        path = os.path.join(folder, name)
        if name.startswith("param_map_buffer") and beside not in names:
            os.makedirs(os.path.join(folder, "replaced"), exist_ok=True)
            os.replace(path, os.path.join(folder, "replaced", name))
        elif name not in keep:
            os.unlink(path)


def _link_atomically(source: str, path: str, content: bytes) -> None:
    """Give `source`, which holds `content`, a second name; copy it where hard links are unknown."""
    part = f"{path}.{os.getpid()}.part"
    try:
        os.link(source, part)
    except OSError:
        write_atomically(path, content)
    else:
        os.replace(part, path)
