"""Null text (arXiv 2404.02747, section 3) as a plugin: some steps run without the caption."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from cachekit import OPEN, Action, Kind, Policy, hookimpl

if TYPE_CHECKING:
    from cachekit import Plan, Report

_log = logging.getLogger("cachekit")


@hookimpl
def cachekit_register_policies(register: Callable[[type[Policy]], None]) -> None:
    """Register `null_text`."""
    from .policy import NullText

    register(NullText)


@hookimpl
def cachekit_check_plan(plan: Plan) -> list[str]:
    """Refuse to keep cross-attention on a step without text: later steps would never use the caption."""
    reasons = []
    for row in plan.rows:
        narrowing = None if row.narrowed_by is None else plan.assignments[row.narrowed_by].policy
        if narrowing is None or narrowing.name != "null_text":
            continue
        for bound, action in zip(plan.assignments, row.actions):
            if bound.target.kind is Kind.CROSS_ATTENTION and action in (Action.STORE, OPEN):
                keeps = "keeps" if action is Action.STORE else "may keep"
                reasons.append(
                    f"{str(narrowing)!r} takes the text away at step {row.step}, where {str(bound.policy)!r} {keeps}"
                    " cross-attention; keep it at another step"
                )
    return reasons


@hookimpl
def cachekit_run_finished(report: Report) -> None:
    """Warn where the unconditional branch carries a negative prompt instead of the empty one."""
    if "null_text" in report.policies and report.arguments.get("negative_prompt"):
        _log.warning("null_text ran with a negative prompt: that, not the empty prompt, stood in for the caption")
