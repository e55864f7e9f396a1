"""TeaCache (arXiv 2411.19108) as a plugin: the modulated input shows how much the output has changed."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `teacache`."""
    from .policy import TeaCache

    register(TeaCache)
