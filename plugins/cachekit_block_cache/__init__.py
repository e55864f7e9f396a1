"""Block caching (arXiv 2312.03209) as a plugin: each block of a UNet is reused while it changes little."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `block_cache`."""
    from .policy import BlockCache

    register(BlockCache)
