"""DeepCache (arXiv 2312.00858) as a plugin: the deep features of a UNet change slowly."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `deepcache`."""
    from .policy import DeepCache

    register(DeepCache)
