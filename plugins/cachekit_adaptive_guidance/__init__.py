"""Adaptive guidance (arXiv 2312.12487) as a plugin: guidance ends once it no longer changes anything."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `adaptive_guidance`."""
    from .policy import AdaptiveGuidance

    register(AdaptiveGuidance)
