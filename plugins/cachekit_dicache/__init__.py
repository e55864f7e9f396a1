"""DiCache (arXiv 2508.17356) as a plugin: the first blocks show how far the residual has moved."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `dicache`."""
    from .policy import DiCache

    register(DiCache)
