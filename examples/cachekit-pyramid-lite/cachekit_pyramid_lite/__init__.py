"""Pyramid lite (arXiv 2408.12588) as a plugin: self-attention changes little in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, Schedule, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `pyramid_lite`."""
    from .policy import PyramidLite

    register(PyramidLite)


@hookimpl
def cachekit_register_schedules(register: Callable[[type[Schedule]], None]) -> None:
    """Register its schedule, for other policies and for `cache`."""
    from .policy import Broadcast

    register(Broadcast)
