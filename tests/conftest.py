"""Fixtures that all tests share: real training runs, made once and kept in .cache/trained."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.tiny.trained import Trained, train_cached
from tests.lab.variants import VARIANTS, is_quick, runs

settings.register_profile("house", deadline=None)  # other jobs share the machine
settings.load_profile("house")


@pytest.fixture(scope="session")
def trained() -> Callable[..., Trained]:
    """trained(core="0.16.1", **options of examples/train_tiny.py): that run, in a folder to be read only."""

    def run(core: str = "0.16.1", **options: Any) -> Trained:
        return train_cached({"core": core, **options})

    return run


@pytest.fixture(scope="session")
def trained_variant(trained: Callable[..., Trained]) -> Callable[[str, str], Trained]:
    """trained_variant(core, variant): the run of that name in tests/lab/variants.py."""
    return lambda core, variant: trained(core, **VARIANTS[variant])


def every_run(*variants: str) -> pytest.MarkDecorator:
    """Parametrize (core, variant) over those variants, or over all; what is beyond the quick suite is marked full."""
    return pytest.mark.parametrize(("core", "variant"), [
        pytest.param(core, variant, id=f"{core}-{variant}", marks=[] if is_quick(core, variant) else [pytest.mark.full])
        for core, variant in runs() if not variants or variant in variants])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name every skipped test with its reason: -rs groups them by line."""
    skipped = terminalreporter.stats.get("skipped", [])
    for report in skipped:
        terminalreporter.write_line(f"skipped: {report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")
