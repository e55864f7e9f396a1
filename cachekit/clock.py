"""Tell runs and steps apart from what the denoiser is given, without waiting for the accelerator."""

from __future__ import annotations

from typing import Any

import torch


class Clock:
    """Count the steps of a pipeline's loop.

    A timestep that is a view of the scheduler's own table is recognised by its place in the table, which is
    exact for schedulers that repeat timesteps (Heun, KDPM2) or add calls (PNDM), and needs no transfer. Other
    timesteps are told apart by the scheduler's step index, or by value where there is none. Within a step any
    number of calls may follow.
    """

    def __init__(self, exact: bool) -> None:
        """Start before the first call; `exact` says that somebody else ends the run (a pipeline's call)."""
        self.exact = exact
        self.step = -1
        self.first_place = 0
        self._table: Any = None
        self._mark: tuple[str, Any] | None = None

    def starts_anew(self, timestep: Any, scheduler: Any) -> bool:
        """Tell whether this call belongs to a new run: new timesteps, or a timestep that rises."""
        if self.exact or self.step < 0:
            return False
        if getattr(scheduler, "timesteps", None) is not self._table:
            return True
        kind, value = self._mark_of(timestep, scheduler)
        return self._mark is None or kind != self._mark[0] or _rank(value) < _rank(self._mark[1])

    def tick(self, timestep: Any, scheduler: Any) -> int:
        """Return the 0-based step that this call belongs to."""
        mark = self._mark_of(timestep, scheduler)
        if self.step < 0:
            self._table = getattr(scheduler, "timesteps", None)
            self.first_place = mark[1] if mark[0] == "place" else 0
        if mark != self._mark:
            self.step += 1
            self._mark = mark
        return self.step

    def _mark_of(self, timestep: Any, scheduler: Any) -> tuple[str, Any]:
        if not isinstance(timestep, torch.Tensor):
            return ("value", (-float(timestep), _step_index(scheduler)))
        table = getattr(scheduler, "timesteps", None)
        if isinstance(table, torch.Tensor) and _is_view(timestep, table):
            return ("place", timestep.storage_offset() - table.storage_offset())
        index = _step_index(scheduler)
        if self.exact and index is not None:
            return ("index", index)
        return ("value", (-float(timestep.reshape(-1)[0]), index))


def count_steps(pipe: Any, clock: Clock, scheduler: Any, timestep: Any) -> int:
    """Return the number of iterations of the loop that has just begun.

    The pipeline's own count comes first (image-to-image shortens the loop), then the scheduler's table from
    the first timestep on, then the timestep's own storage.
    """
    counted = getattr(pipe, "_num_timesteps", None) if clock.exact else None
    if isinstance(counted, int):
        return counted
    table = getattr(scheduler, "timesteps", None)
    if isinstance(table, torch.Tensor) and clock.exact:
        return max(1, len(table) - clock.first_place)
    if isinstance(timestep, torch.Tensor) and timestep.dim() == 0:
        return max(1, timestep.untyped_storage().nbytes() // timestep.element_size() - int(timestep.storage_offset()))
    return max(1, len(table)) if table is not None else 1


def _is_view(timestep: torch.Tensor, table: torch.Tensor) -> bool:
    return timestep.device == table.device and (
        timestep.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()
    )


def _step_index(scheduler: Any) -> Any:
    return getattr(scheduler, "_step_index", None)


def _rank(value: Any) -> Any:
    """Return what rises from step to step: the place, or the negated timestep."""
    return value[0] if isinstance(value, tuple) else value
