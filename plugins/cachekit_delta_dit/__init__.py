"""Delta-DiT (arXiv 2406.01125) as a plugin: what a span of transformer blocks adds changes slowly."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `delta_dit`."""
    from .policy import DeltaDiT

    register(DeltaDiT)
