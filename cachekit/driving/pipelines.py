"""The pipelines that run with attached denoisers."""

from __future__ import annotations

import weakref
from typing import Any

from cachekit.runs.state import PipelineCall
from cachekit.upstream.schedulers import scheduler_of, shares_table


class Pipelines(weakref.WeakSet[Any]):
    """The pipelines that have been attached, or have run with an attached denoiser; a deep copy is empty."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipelines:
        """Start empty: a copied denoiser belongs to no pipeline yet."""
        return Pipelines()

    def scheduler_behind(self, timestep: Any, running: PipelineCall | None) -> Any:
        """Find the scheduler of a timestep: the running pipeline's, else the one that the timestep belongs to."""
        if running is not None:
            return scheduler_of(running.pipe)
        known = [scheduler_of(pipe) for pipe in list(self)]
        owners = [scheduler for scheduler in known if shares_table(timestep, scheduler)]
        return owners[0] if owners else (known[0] if len(known) == 1 else None)
