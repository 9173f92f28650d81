"""The benchmarks: what `make bench` runs, and how it runs commands."""

import re
import subprocess
import sys

from bench.measure import run
from tests.support import paths

ROOT = paths.ROOT


def test_make_bench_runs_all_of_them():
    said = subprocess.run(
        ["make", "--dry-run", "bench"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in ("run", "metaseq", "plan_scale", "plan_opt175b"):
        assert re.search(rf"-m bench\.{name}\b|for plan in [\w ]*\b{name}\b", said), name


def test_commands_may_keep_what_python_compiles(monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert (
        run([sys.executable, "-c", "import sys; print(sys.dont_write_bytecode)"], ROOT).output
        == "False\n"
    )
