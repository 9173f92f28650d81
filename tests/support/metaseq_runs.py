"""What the tests of test_metaseq_target share with others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support import paths

ROOT = paths.ROOT


def run_lab(module: str, folder: Path, options: list[dict]) -> None:
    path = folder / f"{module}.json"
    path.write_text(json.dumps(options))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.support.{module}", path],
        cwd=ROOT,
        timeout=900,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
