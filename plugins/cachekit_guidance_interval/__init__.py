"""A guidance interval (arXiv 2404.07724) as a plugin: guidance helps in the middle of a run alone."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `guidance_interval`."""
    from .policy import GuidanceInterval

    register(GuidanceInterval)
