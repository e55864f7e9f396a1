"""Forecasts of the denoiser's whole output, and `cache`, which combines any place, schedule and stand-in."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `forecast` and `cache`."""
    from .policy import Cache, Forecast

    register(Forecast)
    register(Cache)
