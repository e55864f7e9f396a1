"""The present run and call of each thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from cachekit.errors import AttachmentError
from cachekit.reports.report import Report
from cachekit.runs.call import Call
from cachekit.runs.run import Run


@dataclass(frozen=True)
class PipelineCall:
    """A call of a pipeline that is under way: the pipeline, and its arguments by name, defaults included."""

    pipe: Any
    arguments: dict[str, Any]


class RunState(threading.local):
    """The present run and call of a thread; a deep copy starts empty.

    `reports` are of the runs that ended within the present pipeline call: one that calls others, or has a second
    loop, makes several. `context` is the name that the pipeline gives the present denoiser call, if any; `paused`
    counts the blocks that run uncached.
    """

    run: Run | None = None
    call: Call | None = None
    paused: int = 0
    pipeline: PipelineCall | None = None
    context: str | None = None
    reports: tuple[Report, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> RunState:
        """Make a new state: a run is never shared with a copy of the model."""
        return RunState()

    def __reduce__(self) -> Any:
        """Refuse: unpickling would make another denoiser."""
        raise AttachmentError("an attached denoiser cannot be pickled; call cachekit.remove(pipe) first")
