"""Installs a release of megatron-core from the package index into .cache/megatron-core-X, once.

Each release stands in a folder of its own and beside, not in, the environment, so that several can
be tested."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"


def fetch_core(release: str) -> Path:
    """The folder of megatron-core `release`, e.g. 0.16.1; installed by pip where it is not there
    yet.

    0.17 and later ask for Python 3.12, and have wheels for 3.11 all the same.

    Raises SystemExit with pip's last line where it cannot be had.
    """
    folder = CACHE / f"megatron-core-{release}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"megatron-core-{release}.", dir=CACHE))
    try:
        pip = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                "--ignore-requires-python",
                "--target",
                partial,
                f"megatron-core=={release}",
            ],
            capture_output=True,
            text=True,
        )
        if pip.returncode:
            raise SystemExit(
                f"megatron-core {release} cannot be installed: "
                f"{pip.stderr.strip().splitlines()[-1:]}"
            )
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def publish(partial: Path, folder: Path) -> None:
    """Give a finished folder its name, unless another process was faster and the name is taken."""
    partial.chmod(0o755)
    try:
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", nargs="+", help="e.g. 0.16.1")
    for name in parser.parse_args().release:
        print(fetch_core(name))
