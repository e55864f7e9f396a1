"""List what is installed."""

from __future__ import annotations

from .adapter import Adapter
from .catalog import installed
from .policy import Policy


def policies() -> dict[str, type[Policy]]:
    """Return the installed policies by name, sorted."""
    return dict(sorted(installed().policies.items()))


def adapters() -> dict[str, Adapter]:
    """Return the installed adapters by name, sorted."""
    return dict(sorted(installed().adapters.items()))
