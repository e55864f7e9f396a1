"""EasyCache (arXiv 2507.02860) as a plugin: the output changes in proportion to the sample."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `easycache`."""
    from .policy import EasyCache

    register(EasyCache)
