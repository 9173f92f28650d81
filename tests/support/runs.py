"""The runs of real training that tests go through."""

from __future__ import annotations

import pytest

from tests.support.variants import is_quick, runs


def every_run(*variants: str) -> pytest.MarkDecorator:
    """Parametrize (core, variant) over those variants, or over all; what is beyond the quick suite
    is marked full."""
    return pytest.mark.parametrize(
        ("core", "variant"),
        [
            pytest.param(
                core,
                variant,
                id=f"{core}-{variant}",
                marks=[] if is_quick(core, variant) else [pytest.mark.full],
            )
            for core, variant in runs()
            if not variants or variant in variants
        ],
    )
