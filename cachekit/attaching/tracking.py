"""Bound runs by a pipeline's calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from cachekit.attaching.lookup import attachments_of
from cachekit.switches.subclassing import intercept_calls, stop_intercepting


def track(pipe: Any) -> None:
    """Intercept each call of this pipeline instance, to bound its runs."""
    intercept_calls(pipe, _as_one_run)


def untrack(pipe: Any) -> None:
    """Put the pipeline's own class back."""
    stop_intercepting(pipe)


def _as_one_run(base: Any) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as runs:
            for attachment in attachments_of(self):
                runs.enter_context(attachment.run_of(self, args, kwargs))
            return base.__call__(self, *args, **kwargs)

    return call
