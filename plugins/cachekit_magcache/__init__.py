"""MagCache (arXiv 2506.09045) as a plugin: the residual's magnitude changes alike for all prompts."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `magcache`."""
    from .policy import MagCache

    register(MagCache)
