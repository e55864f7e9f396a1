"""The adapter `dit`, for diffusion transformers: PixArt, DiT and any other with blocks around attention."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Adapter, hookimpl


@hookimpl
def cachekit_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the transformer adapter."""
    from .adapter import DiTAdapter

    register(DiTAdapter())
