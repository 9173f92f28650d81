"""A run that is killed, or whose disk fails, at some of the calls that change the disk; `make crash`
tries all of them."""

import pytest

from tests.support import crash


@pytest.fixture(scope="module")
def trial():
    return crash.trial_of(crash.OVER)


def points(trial, *names):
    """The numbers of all calls of these names."""
    return [number for number, name in enumerate(trial.names) if name in names]


def test_there_are_many(trial):
    assert len(trial.names) > 300 and len(trial.points(crash.MOST_WRITES)) > 100


@pytest.mark.parametrize("is_again_without", [False, True])
def test_killed_at_any_rename_the_target_is_whole(trial, is_again_without):
    """The renames that publish, and the first of what is removed after them."""
    renames = points(trial, "rename")
    assert len(renames) == 3
    for at in (*renames, renames[-1] + 1, renames[-1] + 2):
        assert crash.faults_of(trial, crash.KILL, at, is_again_without) == []


def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(trial):
    for at in range(3, len(trial.names), 97):
        assert crash.faults_of(trial, crash.KILL, at) == []


def test_a_call_that_fails_is_one_line(trial):
    """The first and the last of each kind of call."""
    for name in sorted(set(trial.names)):
        there = points(trial, name)
        assert crash.faults_of(trial, crash.ENOSPC, there[0]) == []
        assert crash.faults_of(trial, crash.EIO, there[-1]) == []
