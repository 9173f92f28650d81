"""A bounded number of damaged inputs per file format and per reader; `make fuzz` runs more."""

import time

import pytest

from tests.fuzz import campaign
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_read_or_refused_in_one_line(name, tmp_path):
    result = campaign.run(name, 0, TARGETS[name].cases, time.monotonic() + 600, tmp_path)
    assert not result.findings
    assert result.counts[campaign.REFUSED]
