"""The installed policies and adapters."""

from __future__ import annotations

from cachekit.interface.adapter import Adapter
from cachekit.interface.policy import Policy
from cachekit.registry.catalog import installed


def policies() -> dict[str, type[Policy]]:
    """List the installed policy classes by name, sorted.

    >>> str(policies()["deepcache"](interval=5))
    'deepcache:interval=5'
    """
    return dict(sorted(installed().policies.items()))


def adapters() -> dict[str, Adapter]:
    """List the installed adapters by name, sorted.

    >>> {"dit", "unet"} <= set(adapters())
    True
    """
    return dict(sorted(installed().adapters.items()))
