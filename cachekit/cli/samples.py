"""Policies made to be described: with defaults, and with the settings that they can't do without."""

from __future__ import annotations

import contextlib

from cachekit.errors import SpecError
from cachekit.interface.policy import Policy
from cachekit.interface.specs import parse
from cachekit.registry.catalog import installed

#: Settings of the policies that have no choices without any.
NEEDED = {"calibrated": "interval=4", "null_text": "after=10"}


def sample(name: str) -> Policy:
    """Make an installed policy with its defaults, or the settings above."""
    return parse(f"{name}:{NEEDED[name]}" if name in NEEDED else name, installed())


def samples() -> dict[str, Policy]:
    """Make all installed policies, by name; those with other keys that they can't do without are left out."""
    found = {}
    for name in sorted(installed().policies):
        with contextlib.suppress(SpecError):
            made = sample(name)
            made.chosen()
            found[name] = made
    return found
