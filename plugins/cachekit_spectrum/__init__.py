"""Spectrum (arXiv 2603.01623) as a plugin: features as functions of time, fitted by Chebyshev polynomials."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, Schedule, StandIn, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `spectrum`."""
    from .policy import Spectrum

    register(Spectrum)


@hookimpl
def cachekit_register_schedules(register: Callable[[type[Schedule]], None]) -> None:
    """Register `growing`."""
    from .policy import Growing

    register(Growing)


@hookimpl
def cachekit_register_stand_ins(register: Callable[[type[StandIn]], None]) -> None:
    """Register `spectral`."""
    from .policy import Spectral

    register(Spectral)
