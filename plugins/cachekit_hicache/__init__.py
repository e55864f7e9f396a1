"""HiCache (arXiv 2508.16984) as a plugin: TaylorSeer with scaled Hermite polynomials in place of powers."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `hicache`."""
    from .policy import HiCache

    register(HiCache)
