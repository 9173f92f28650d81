"""What the tests of test_metaseq_patch share with others."""

from __future__ import annotations

import os

import pytest

from tests.support import paths

ROOT = paths.ROOT

PATCH = ROOT / "patches/metaseq_param_map.patch"

CHECKOUT = os.environ.get("METASEQ")

needs_checkout = pytest.mark.skipif(
    not CHECKOUT, reason="METASEQ does not name a git checkout of metaseq"
)
