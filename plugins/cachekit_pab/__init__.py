"""PAB (arXiv 2408.12588) as a plugin: attention changes little in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable

from cachekit import Policy, hookimpl


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `pab`."""
    from .policy import PyramidAttentionBroadcast

    register(PyramidAttentionBroadcast)
