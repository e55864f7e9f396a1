"""SmoothCache (arXiv 2411.10510) as a plugin: layers are reused where measured errors are small."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `smoothcache`."""
    from .policy import SmoothCache

    register(SmoothCache)
