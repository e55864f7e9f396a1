"""The hooks of cachekit. A plugin implements them as module-level functions, marked with `cachekit.hookimpl`.

The module is named by an entry point in the group `cachekit`. A whole plugin::

    from cachekit import hookimpl


    @hookimpl
    def cachekit_register_policies(register):
        from .policy import EverySecond

        register(EverySecond)

An implementation may leave out arguments. A plugin with a misspelt hook or argument, or one that raises while it
registers, is left out with a warning that gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from cachekit.interface.adapter import Adapter
    from cachekit.interface.parts import Schedule, StandIn, Where
    from cachekit.interface.policy import Policy
    from cachekit.planning.plan import Plan
    from cachekit.runs.report import Report

hookspec = pluggy.HookspecMarker("cachekit")
#: Marks a function of a plugin as the implementation of the hook of the same name.
hookimpl = pluggy.HookimplMarker("cachekit")


@hookspec
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Call `register` with each policy class of this plugin.

    Called once per process. Import the classes inside the function, so that importing the plugin stays cheap.
    """


@hookspec
def cachekit_register_places(register: Callable[[type[Where]], None]) -> None:
    """Call `register` with each class of places, the values of `where=`; otherwise as for policies."""


@hookspec
def cachekit_register_schedules(register: Callable[[type[Schedule]], None]) -> None:
    """Call `register` with each class of schedules, the values of `when=`; otherwise as for policies."""


@hookspec
def cachekit_register_stand_ins(register: Callable[[type[StandIn]], None]) -> None:
    """Call `register` with each class of stand-ins, the values of `what=`; otherwise as for policies."""


@hookspec
def cachekit_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Call `register` with an instance of each adapter of this plugin; otherwise as for policies."""


@hookspec
def cachekit_check_plan(plan: Plan) -> list[str]:  # type: ignore[empty-body]
    """Check a plan: list a line for each reason why its policies must not run together, or nothing.

    Called once by `apply`, with the plan of 50 guided steps, before anything is changed. The first reason of all
    plugins, sorted by name, becomes the message of a `ConflictError`: quote the specs and what to do instead.
    """


@hookspec
def cachekit_run_finished(report: Report) -> None:
    """Use the report of a run of a pipeline that has ended without an exception, to log or collect it.

    An exception raised here becomes a `PluginWarning`: the images are not lost.
    """
