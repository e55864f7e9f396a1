"""Log the warnings of each report when its run ends, such as policies that never fired."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cachekit.registry.hookspecs import hookimpl

if TYPE_CHECKING:
    from cachekit.runs.report import Report

_log = logging.getLogger("cachekit")


@hookimpl
def cachekit_run_finished(report: Report) -> None:
    """Log each warning of the report."""
    for warning in report.warnings:
        _log.warning("%s", warning)
