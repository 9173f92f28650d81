"""Fixtures that all tests share: real training runs, made once and kept in .cache/trained."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.tiny.trained import Trained, train_cached
from tests.support.variants import VARIANTS

os.environ.setdefault("PARAMMAP_TRACEBACK", "1")  # a defect fails a test with its traceback
settings.register_profile("house", deadline=None)  # other jobs share the machine
settings.load_profile("house")


@pytest.fixture(scope="session", autouse=True)
def extensions_are_the_sessions_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What torch compiles for a framework: where it is kept for the user, a run that was killed
    leaves a lock that all later ones wait for."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("torch_extensions"))


@pytest.fixture(scope="session")
def trained() -> Callable[..., Trained]:
    """trained(core="0.16.1", **options of examples/train_tiny.py): that run, in a folder to be read
    only."""

    def run(core: str = "0.16.1", **options: Any) -> Trained:
        return train_cached({"core": core, **options})

    return run


@pytest.fixture(scope="session")
def trained_variant(trained: Callable[..., Trained]) -> Callable[[str, str], Trained]:
    """trained_variant(core, variant): the run of that name in tests/support/variants.py."""
    return lambda core, variant: trained(core, **VARIANTS[variant])


#: fixtures that train
_TRAINING = {"trained", "trained_variant"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark `live` what trains: all of tests/live, and whatever asks for a run; `alone` what starts
    a Ray cluster."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "tests/live/" in item.nodeid or _TRAINING & fixtures:
            item.add_marker(pytest.mark.live)
        if "cluster" in fixtures:
            item.add_marker(pytest.mark.alone)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name every skipped test with its reason: -rs groups them by line."""
    skipped = terminalreporter.stats.get("skipped", [])
    for report in skipped:
        terminalreporter.write_line(
            f"skipped: {report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}"
        )
