"""The manifest of an output: what was converted, from what, with which findings."""

from __future__ import annotations

import json
from pathlib import Path

MANIFEST = "parammap_manifest.json"


def read_manifest(target: Path) -> dict | None:
    """The manifest of an output, if there is one and the files that it names are all there."""
    path = target / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        whole = all((target / f["path"]).stat().st_size == f["bytes"] for f in manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if whole else None
