"""Inspect diffusers schedulers: timestep tables and step indices."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_UNKNOWN = 100


def is_entry(timestep: Tensor) -> bool:
    """Tell whether a tensor is one entry of a longer table, perhaps expanded over the batch."""
    one_place = all(size == 1 or stride == 0 for size, stride in zip(timestep.shape, timestep.stride()))
    return one_place and not timestep.is_meta and table_length(timestep) > 1


def table_length(timestep: Tensor) -> int:
    """Return the number of entries of the table that a timestep lies in."""
    return int(timestep.untyped_storage().nbytes() // timestep.element_size())


def shares_table(timestep: Any, scheduler: Any) -> bool:
    """Tell whether a timestep is an entry of this scheduler's table."""
    table = getattr(scheduler, "timesteps", None)
    if not (isinstance(table, Tensor) and isinstance(timestep, Tensor)) or table.device != timestep.device:
        return False
    return bool(timestep.untyped_storage().data_ptr() == table.untyped_storage().data_ptr())


def count_steps(pipe: Any, scheduler: Any, timestep: Any) -> int:
    """Return the number of iterations of the loop whose first timestep this is.

    The pipeline's own count comes first (image-to-image shortens the loop), then the timestep's place in its
    table, then the scheduler's table. Where nothing tells, it is a round number that a plan can outgrow.
    """
    counted = getattr(pipe, "_num_timesteps", None)
    if isinstance(counted, int):
        return counted
    if isinstance(timestep, Tensor) and is_entry(timestep):
        return table_length(timestep) - int(timestep.storage_offset())
    table = getattr(scheduler, "timesteps", None)
    return max(1, len(table)) if isinstance(table, Tensor) else _UNKNOWN


def step_index(scheduler: Any) -> int | None:
    """Read the scheduler's own step index; None before its loop begins."""
    index = getattr(scheduler, "_step_index", None)
    return index if isinstance(index, int) else None
