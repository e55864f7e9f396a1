"""Inspect diffusers schedulers: timestep tables and step indices.

Pipelines take timesteps out of their scheduler's table by indexing, so a timestep is usually a view of one entry, and
its storage is the table's.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import Tensor

#: Schedulers that add noise in each step, beside those with "Ancestral" or "SDE" in their names.
_NOISY = frozenset({"DDPMScheduler", "LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"})
#: Number of steps to plan where nothing gives one; a longer run lengthens its plan.
UNKNOWN_STEPS = 100


def is_entry(timestep: Tensor) -> bool:
    """Whether a tensor is a view of a single entry of a longer table, expanded over the batch or not."""
    return entry_of(timestep) is not None


def entry_of(timestep: Tensor) -> tuple[int, int] | None:
    """Find the place of an entry in its table, and the table's address; None for any other tensor."""
    if timestep.dim() and any(size != 1 and stride for size, stride in zip(timestep.shape, timestep.stride())):
        return None
    storage = timestep.untyped_storage()
    if timestep.is_meta or storage.nbytes() < 2 * timestep.element_size():
        return None
    return int(timestep.storage_offset()), storage.data_ptr()


def shares_table(timestep: Any, scheduler: Any) -> bool:
    """Whether a timestep is a view of this scheduler's table."""
    table = getattr(scheduler, "timesteps", None)
    if not (isinstance(table, Tensor) and isinstance(timestep, Tensor)) or table.device != timestep.device:
        return False
    return bool(timestep.untyped_storage().data_ptr() == table.untyped_storage().data_ptr())


def count_steps(pipe: Any, scheduler: Any, timestep: Any) -> int | None:
    """Count the iterations of the loop whose first timestep is given; None where nothing gives their number.

    The pipeline's own count comes first, because image-to-image shortens the loop, then the timestep's place in its
    table, then the length of the scheduler's table.
    """
    counted = getattr(pipe, "_num_timesteps", None)
    if isinstance(counted, int):
        return counted
    if isinstance(timestep, Tensor) and is_entry(timestep):
        return _table_length(timestep) - int(timestep.storage_offset())
    table = getattr(scheduler, "timesteps", None)
    return max(1, len(table)) if isinstance(table, Tensor) else None


def iterations_of(scheduler: Any) -> int | None:
    """Count the entries of a scheduler's table, each of which is an iteration of the loop; None where it has none."""
    table = getattr(scheduler, "timesteps", None)
    return len(table) if isinstance(table, Tensor) and table.dim() == 1 and len(table) else None


def planned_scheduler(pipe: Any, steps: int) -> Any:
    """Make a copy of a pipeline's scheduler that is set to `steps`, as the pipeline's call sets it by default.

    None if `set_timesteps` needs more, such as a shift that depends on the image's size.
    """
    scheduler = scheduler_of(pipe)
    if scheduler is None:
        return None
    planned = copy.deepcopy(scheduler)
    try:
        if _gives_sigmas(pipe, planned):
            planned.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
        else:
            planned.set_timesteps(steps)
    except Exception:  # noqa: BLE001 - schedulers raise whatever they like where they miss an argument
        return None
    return planned


def _gives_sigmas(pipe: Any, scheduler: Any) -> bool:
    """Whether a pipeline gives its scheduler shares of noise, equally spaced from 1 down to 1 / steps.

    Those that do, such as Flux and HunyuanVideo, all calculate them in their calls, by a function of one name.
    """
    code = getattr(inspect.unwrap(type(pipe).__call__), "__code__", None)
    takes_them = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    own = getattr(scheduler.config, "use_flow_sigmas", False)
    return code is not None and "linspace" in code.co_names and takes_them and not own


def adds_noise(scheduler: Any) -> bool:
    """Whether a scheduler adds fresh noise in each step, so that outputs of neighbouring steps don't lie on a curve."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    own = str(config.get("algorithm_type", "")).startswith("sde") or bool(config.get("stochastic_sampling"))
    return own or name in _NOISY or "Ancestral" in name or "SDE" in name


def is_high_order(scheduler: Any) -> bool:
    """Whether a scheduler is set to an order above one, as DPM-Solver and UniPC are by default."""
    return int(getattr(scheduler, "config", {}).get("solver_order") or 1) > 1


def step_index(scheduler: Any) -> int | None:
    """Read the scheduler's own step index; None before its loop begins."""
    index = getattr(scheduler, "_step_index", None)
    return index if isinstance(index, int) else None


def scheduler_of(pipe: Any) -> Any:
    """Get a pipeline's scheduler, or None."""
    return getattr(pipe, "scheduler", None)


def _table_length(timestep: Tensor) -> int:
    """Count the entries of the table that a timestep is a view of."""
    return int(timestep.untyped_storage().nbytes() // timestep.element_size())
