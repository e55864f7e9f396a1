"""Each mistake is found by the check that is named for it, which says where, or why."""

from __future__ import annotations

import re

import pytest
from support.wrong import MISTAKES, Wrong

from cachekit import CachekitError, Choice, Every, Reuse, WholeDenoiser
from cachekit.testing import CHECKS, Outcome, check_policy


@pytest.mark.parametrize("name", MISTAKES)
def test_it_is_caught(name):
    mistake = MISTAKES[name]
    (result,) = check_policy(mistake.policy, models=[mistake.model], checks=[mistake.check])
    assert result.outcome is Outcome.FAILED, str(result)
    assert str(result).startswith(f"failed: {mistake.check} of {mistake.policy} on {mistake.model}: ")
    assert result.note.endswith(f"; likely cause: {CHECKS[mistake.check].cause}")
    assert len(str(result).splitlines()) == 1
    if not mistake.nowhere:
        assert f"'{mistake.site}'" in result.note
        assert re.search(rf"\b(in|at) step {mistake.step}\b", result.note), result.note


def test_there_is_a_mistake_for_each_check():
    assert {mistake.check for mistake in MISTAKES.values()} == set(CHECKS)


class ClassForInstance(Wrong):
    """A choice with a class where an instance belongs."""

    def choices(self):
        return {"it": Choice(WholeDenoiser(), Every, Reuse())}


def test_a_class_for_an_instance_is_refused_before_any_check():
    with pytest.raises(CachekitError, match=r"has the class Every as when; write Every\(\)"):
        check_policy(ClassForInstance())


def test_only_what_is_found_without_a_run_names_no_site_and_no_step():
    nowhere = {mistake.check for mistake in MISTAKES.values() if mistake.nowhere}
    assert nowhere == {"check_names", "check_spec_round_trip"}


def test_a_policy_that_does_not_run_fails_one_check_and_skips_the_others():
    results = check_policy(MISTAKES["BareTensor"].policy, models=["pixart"], checks=["check_runs", "check_undo"])
    assert [result.outcome for result in results] == [Outcome.FAILED, Outcome.SKIPPED]
    assert "return a tuple of 1 tensors" in results[0].note
