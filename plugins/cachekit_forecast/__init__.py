"""Forecasts of the denoiser's whole output, and `cache`, which combines any place, schedule and stand-in."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, StandIn, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `forecast`, `calibrated` and `cache`."""
    from .cache import Cache
    from .calibrated import CalibratedForecast
    from .policy import Forecast

    for policy in (Forecast, CalibratedForecast, Cache):
        register(policy)


@hookimpl
def cachekit_register_stand_ins(register: Callable[[type[StandIn]], None]) -> None:
    """Register `calibrated`."""
    from cachekit import Calibrated

    register(Calibrated)
