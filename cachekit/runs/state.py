"""The present run and call of each thread."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from cachekit.errors import AttachmentError
from cachekit.reports.record import CallRecord
from cachekit.runs.call import Call
from cachekit.runs.run import Run

if TYPE_CHECKING:
    from cachekit.reports.report import Report


class RunState(threading.local):
    """Hold the present run and call of each thread; a deep copy starts empty.

    `reports` are of the runs that ended within the present call of a pipeline: one that calls others, or has a
    second loop, makes several. `context` is the name that the pipeline gives the present call, if any; `replayed`
    the call whose row the next one obeys instead of the clock.
    """

    run: Run | None = None
    call: Call | None = None
    paused: int = 0
    pipeline: tuple[Any, dict[str, Any]] | None = None
    context: str | None = None
    reports: tuple[Report, ...] = ()
    replayed: CallRecord | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RunState:
        """Return a fresh state: a run is never shared with a copy of the model."""
        return RunState()

    def __reduce__(self) -> Any:
        """Raise: whoever unpickled it would have another denoiser."""
        raise AttachmentError("an attached denoiser cannot be pickled; call cachekit.remove(pipe) first")
