"""Identify the run and step of each denoiser call, without device syncs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cachekit.upstream.schedulers import entry_of, shares_table, step_index

_MOST_CALLS = 8


class Mark(NamedTuple):
    """One timestep: its place in a table of timesteps, a scheduler's step index, or its value.

    `place` rises from step to step within one `table`; `source` is held so that the address of the table is not
    reused while it is compared. `time` is the greatest of several values.
    """

    kind: str
    place: float
    table: int = 0
    scheduler_step: int | None = None
    source: Any = None
    time: float = 0.0

    def same_step(self, other: Mark | None) -> bool:
        """Whether both belong to one iteration of the loop."""
        return other is not None and self[:4] == other[:4]

    def begins_after(self, other: Mark) -> bool:
        """Whether this can only be a new run: other timesteps, or one that lies before the last."""
        return (self.kind, self.table) != (other.kind, other.table) or self.place < other.place


class Clock:
    """Counts the steps of a pipeline's loop, and the calls within a step, both from 0.

    A timestep that is one entry of a longer table is identified by its place there, which is exact for schedulers
    that repeat timesteps (Heun, KDPM2) or add calls (PNDM), and needs no transfer. Within a pipeline's call others
    are identified by the scheduler's step index; all else by value.
    """

    def __init__(self, exact: bool) -> None:
        """Start before the first call; `exact` is whether a pipeline's call ends the run."""
        self.exact = exact
        self.step = -1
        self.call = 0
        self._last: Mark | None = None
        self._trend = 0.0
        self._uncached: dict[float, Mark] = {}

    def starts_anew(self, mark: Mark) -> bool:
        """Whether a call at this mark begins a new run, such as a second loop within a pipeline's call."""
        if self._last is None:
            return False
        if self.exact:
            return self._begins_again(mark, self._last)
        # A loop that stays at one timestep never shows where it begins again, but must not keep tensors for ever.
        endless = mark.same_step(self._last) and self.call + 1 >= _MOST_CALLS
        return endless or mark.begins_after(self._last)

    def _begins_again(self, mark: Mark, last: Mark) -> bool:
        """Whether a second loop begins within a pipeline's call."""
        if "entry" in (mark.kind, last.kind):
            return mark.kind == last.kind and mark.begins_after(last)
        if last.scheduler_step is not None:  # without one, the scheduler has been given its timesteps anew
            return mark.scheduler_step is None or mark.scheduler_step < last.scheduler_step
        return mark.scheduler_step is None and (mark.time - last.time) * self._trend < 0

    def note(self, mark: Mark) -> None:
        """Note an uncached call at this mark: a later step's, or one that looks ahead."""
        if self._lies_ahead(mark):
            self._uncached[mark.place] = mark

    def left_behind(self, mark: Mark) -> list[Mark]:
        """List, in order, the noted calls that turn out to be steps, because a call at this mark follows them."""
        if not self._uncached or not self._lies_ahead(mark):
            return []
        reached = sorted(place for place in self._uncached if place <= mark.place)
        noted = [self._uncached.pop(place) for place in reached]
        return [one for one in noted if one.place < mark.place]

    def _lies_ahead(self, mark: Mark) -> bool:
        """Whether this is an entry further on in the run's own table."""
        last = self._last
        return last is not None and mark.kind == "entry" and mark.table == last.table and mark.place > last.place

    def goes_through(self, scheduler: Any) -> bool:
        """Whether the run's timesteps are entries of this scheduler's table."""
        return self._last is not None and shares_table(self._last.source, scheduler)

    def is_in_table(self, mark: Mark) -> bool:
        """Whether this is an entry of the table that the run's last timestep lies in."""
        return self._last is not None and (self._last.kind, self._last.table) == (mark.kind, mark.table)

    def is_at(self, mark: Mark) -> bool:
        """Whether a call at this mark belongs to the present step."""
        return mark.same_step(self._last)

    def tick(self, mark: Mark) -> int:
        """Advance to the call at this mark; get its 0-based step."""
        if self.is_at(mark):
            self.call += 1
        else:
            self.step, self.call = self.step + 1, 0
            if self._last is not None and self._last.kind == mark.kind:
                self._trend = self._trend or mark.time - self._last.time
            self._last = mark
        return self.step


def mark_of(timestep: Any, scheduler: Any) -> Mark:
    """Mark a denoiser's timestep argument: a tensor of any shape, or a number.

    `scheduler` is the running pipeline's, or None in a bare loop.
    """
    if not isinstance(timestep, Tensor):
        return Mark("value", -float(timestep), scheduler_step=step_index(scheduler), time=float(timestep))
    entry = entry_of(timestep)
    if entry is not None:
        return Mark("entry", *entry, source=timestep)
    index = step_index(scheduler)
    if index is not None:
        return Mark("index", index, scheduler_step=index)
    # In double precision the mean of equal values is exactly that value. The timestep of one frame may not change.
    times = timestep.to("cpu", torch.float64)
    return Mark("value", -float(times.mean()), time=float(times.max()))
