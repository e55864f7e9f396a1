"""TGATE (arXiv 2404.02747) as a plugin: cross-attention converges after a few steps."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `tgate`, and `cair`, the same method under its other name."""
    from .policy import Cair, Tgate

    register(Tgate)
    register(Cair)
