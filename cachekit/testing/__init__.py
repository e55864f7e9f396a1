"""Checks of caching policies against what implementations have broken: the import that a plugin's tests need.

from cachekit.testing import parametrize_with_checks

@parametrize_with_checks(["my_policy:interval=3"])
def test_my_policy(check):
    check()
"""

from __future__ import annotations

from cachekit.testing.models import MODELS
from cachekit.testing.parametrize import parametrize_with_checks
from cachekit.testing.results import Outcome, Result
from cachekit.testing.running import check_policy
from cachekit.testing.table import CHECKS

__all__ = ["CHECKS", "MODELS", "Outcome", "Result", "check_policy", "parametrize_with_checks"]
