"""SeaCache (arXiv 2602.18993) as a plugin: the filtered sample shows how much the image has changed."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `seacache`."""
    from .policy import SeaCache

    register(SeaCache)
