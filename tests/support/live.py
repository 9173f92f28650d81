"""What the tests of test_live share with others."""

from __future__ import annotations

import subprocess
import sys

from tests.support import paths

ROOT = paths.ROOT


def prove(run, out):
    proof = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "examples.mindspore_proof", str(run.path), str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert proof.returncode == 0, proof.stdout + proof.stderr
    assert "proved: mindspore.load_checkpoint loaded" in proof.stdout
