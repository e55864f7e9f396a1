"""FORA (arXiv 2407.01425) as a plugin: attention and feed-forward layers change little from step to step."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `fora`."""
    from .policy import Fora

    register(Fora)
