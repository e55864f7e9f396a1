"""First Block Cache as a plugin: the first block's residual shows how much the others have changed."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `fbcache`."""
    from .policy import FBCache

    register(FBCache)
