"""Declare the hooks of cachekit; a plugin implements them as module-level functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from cachekit.interface.adapter import Adapter
    from cachekit.interface.policy import Policy
    from cachekit.planning.plan import Plan
    from cachekit.reports.report import Report

hookspec = pluggy.HookspecMarker("cachekit")
hookimpl = pluggy.HookimplMarker("cachekit")


@hookspec
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Hand each policy class of this plugin to `register`."""


@hookspec
def cachekit_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Hand each adapter of this plugin to `register`."""


@hookspec
def cachekit_check_plan(plan: Plan) -> list[str]:  # type: ignore[empty-body]
    """Return one line per reason why these policies must not run together, or an empty list.

    Called once by `apply`, with the plan of 50 guided steps, before anything is changed.
    """


@hookspec
def cachekit_run_finished(report: Report) -> None:
    """Look at the report of a pipeline's run that has just ended without an exception."""
