"""Manifests that tests change, as if they had been written so."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from parammap.checkpoint.manifest import MANIFEST


def rewrite(folder: Path, **fields: object) -> None:
    """Give the manifest of a folder other fields, and the checksum that fits (docs/manifest.md)."""
    content = json.loads((folder / MANIFEST).read_text()) | fields
    if content.pop("sha256", None):
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(content))
