"""The adapter `unet`, for diffusers' UNets: SD, SDXL, SVD and any other with down and up blocks."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Adapter, hookimpl


@hookimpl
def cachekit_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the UNet adapter."""
    from .adapter import UNetAdapter

    register(UNetAdapter())
