"""Projections of the text, kept for a run, as a plugin: the text is the same in all steps."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `text_kv`."""
    from .policy import TextKeyValue

    register(TextKeyValue)
