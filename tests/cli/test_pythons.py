"""Newer Pythons, with numpy 2, write what Python 3.11 with numpy 1.26 writes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import paths

NEWER = ("3.12", "3.13", "3.14")


def interpreter(version: str) -> Path | None:
    """A Python of that version: on the PATH, or one that pyenv keeps."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *sorted(kept.glob(f"{version}.*/bin/python"))]
    for python in filter(None, found):
        if subprocess.run([python, "-c", "import venv"], capture_output=True).returncode == 0:
            return Path(python)
    return None


@pytest.mark.parametrize("version", NEWER)
def test_the_recorded_outputs_with_numpy_2(version, tmp_path):
    """Of all conversions of three sources (tests/data/output_matrix.json.xz)."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} is here")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True, capture_output=True)
    own = tmp_path / "venv/bin/python"
    made = subprocess.run([own, "-m", "pip", "install", "numpy>=2"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"numpy 2 cannot be installed for Python {version}: {made.stderr[-300:]}")
    for source in ("megatron/cac60ce4_patched_legacy_tp2pp2", "yuan/", "alpa/"):
        done = subprocess.run(
            [
                own,
                *("-W", "error", "-m", "tests.support.output_matrix", "compare"),
                *("tests/data/output_matrix.json.xz", "--only", source),
            ],
            cwd=paths.ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert ", 0 of them conversions" not in done.stdout
