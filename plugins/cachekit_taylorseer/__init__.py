"""TaylorSeer (arXiv 2503.06923) as a plugin: features follow their Taylor series between full steps."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `taylorseer`."""
    from .policy import TaylorSeer

    register(TaylorSeer)
