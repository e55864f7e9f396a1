"""Register the parts that ship, by the same hooks as those of plugins."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from cachekit.interface.parts import Schedule, StandIn, Where

hookimpl = pluggy.HookimplMarker("cachekit")


@hookimpl
def cachekit_register_places(register: Callable[[type[Where]], None]) -> None:
    """Register the places."""
    from cachekit.parts.places import Features, Guidance, Modulated, NestedRegion, Sites, Span, Tail, WholeDenoiser

    for place in (Features, Guidance, Modulated, NestedRegion, Sites, Span, Tail, WholeDenoiser):
        register(place)


@hookimpl
def cachekit_register_schedules(register: Callable[[type[Schedule]], None]) -> None:
    """Register the schedules."""
    from cachekit.parts.schedules import After, Every, Mask, Quadratic, Window

    for schedule in (After, Every, Mask, Quadratic, Window):
        register(schedule)


@hookimpl
def cachekit_register_stand_ins(register: Callable[[type[StandIn]], None]) -> None:
    """Register the stand-ins."""
    from cachekit.parts.standins import Chebyshev, Drop, Hermite, Linear, Reuse, Taylor

    for stand_in in (Chebyshev, Drop, Hermite, Linear, Reuse, Taylor):
        register(stand_in)
