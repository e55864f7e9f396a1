"""The present run and call of each thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from cachekit.errors import AttachmentError
from cachekit.runs.call import Call
from cachekit.runs.report import Report
from cachekit.runs.run import Run
from cachekit.upstream.guidance import guidance_properties
from cachekit.upstream.guiders import has_guider
from cachekit.upstream.pipelines import call_arguments, controlnets_of


@dataclass(frozen=True)
class PipelineCall:
    """A call of a pipeline that is under way.

    `arguments` are by name, defaults included; `guidance_properties` are those that show the pipeline's guidance, where
    a ControlNet makes it matter, which is called before the denoiser.
    """

    pipe: Any
    arguments: dict[str, Any]
    has_guider: bool
    guidance_properties: tuple[str, ...]

    @classmethod
    def of(cls, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PipelineCall:
        """Read the arguments of a pipeline's call."""
        shown = guidance_properties(pipe) if any(True for _ in controlnets_of(pipe)) else ()
        return cls(pipe, call_arguments(pipe, args, kwargs), has_guider(pipe), shown)

    @property
    def guidance_state(self) -> tuple[Any, ...]:
        """What the pipeline shows of its guidance now."""
        names = self.guidance_properties
        return tuple([getattr(self.pipe, name, None) for name in names]) if names else ()


class RunState(threading.local):
    """The present run and call of a thread; a deep copy starts empty.

    `scope` is what the present run or pipeline call follows, None where there is neither. `reports` are of the runs
    that ended within the present pipeline call: one that calls others, or has a second loop, makes several. `report` is
    the last of this thread. `context` is the name that the pipeline gives the present denoiser call, if any; `paused`
    counts the blocks that run uncached.
    """

    run: Run | None = None
    call: Call | None = None
    paused: int = 0
    pipeline: PipelineCall | None = None
    scope: Any = None
    context: str | None = None
    reports: tuple[Report, ...] = ()
    report: Report | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RunState:
        """Make a new state: a run is never shared with a copy of the model."""
        return RunState()

    def __reduce__(self) -> Any:
        """Refuse: unpickling would make another denoiser."""
        raise AttachmentError("an attached denoiser cannot be pickled; call cachekit.remove(pipe) first")
