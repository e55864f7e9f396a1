"""FasterCache (arXiv 2410.19355) as a plugin: extrapolated attention, and guidance by differences of frequencies."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, StandIn, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `fastercache`."""
    from .policy import FasterCache

    register(FasterCache)


@hookimpl
def cachekit_register_stand_ins(register: Callable[[type[StandIn]], None]) -> None:
    """Register `frequencies`."""
    from .policy import Frequencies

    register(Frequencies)
