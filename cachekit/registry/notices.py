"""Log the warnings of each report when its run ends, such as policies that never fired."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def silent_log() -> Iterator[None]:
    """Suppress the log of each run's warnings, for commands that show or keep the reports themselves."""
    before, _log.disabled = _log.disabled, True
    try:
        yield
    finally:
        _log.disabled = before
