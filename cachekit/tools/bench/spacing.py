"""Spacings of plain steps: those that a scheduler has settings for, and the timesteps of another run's full steps."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cachekit.models.loading import scheduler_for
from cachekit.tools.bench.cells import FULL_STEPS, BenchError, Cell, Spacing

if TYPE_CHECKING:
    import torch

__all__ = ["Rivalry", "absent", "computed_steps", "rivals", "scheduler_with", "table_of"]

#: The settings of schedulers, by the spacings that they make.
_SETTINGS = {Spacing.LU_LAMBDAS.value: "use_lu_lambdas", Spacing.KARRAS.value: "use_karras_sigmas"}
#: Arguments of pipelines and schedulers with a table of their own, and what a scheduler calls its table.
_TABLES = ("timesteps", "sigmas")


#: A contender, the number of plain steps that cost as much, and its stored plan where there is one.
Rivalry = tuple[Cell, int, "Mapping[str, Any] | None"]


def rivals(wanted: Iterable[Rivalry]) -> list[Cell]:
    """List the cells of plain steps that contenders are compared with, each once, with every spacing.

    Where a contender of the uncached number of steps computes the denoiser in as many, their timesteps are a spacing
    too. See `absent` for spacings that a scheduler lacks.
    """
    found: dict[tuple[Any, ...], Cell] = {}
    for cell, steps, plan in wanted:
        if steps >= cell.uncached_steps:
            continue
        computed = computed_steps(plan or {}) if cell.steps == cell.uncached_steps else ()
        for spacing in ("", *_SETTINGS):
            found.setdefault((cell.group, cell.seed, steps, spacing), cell.plain(steps, spacing))
        if len(computed) == steps:
            key = (cell.group, cell.seed, steps, computed)
            found.setdefault(key, cell.plain(steps, FULL_STEPS + "+".join(cell.specs)))
    return list(found.values())


def computed_steps(plan: Mapping[str, Any]) -> tuple[int, ...]:
    """List the steps of a stored plan in which the denoiser runs; none where it always does, or the run decides."""
    marks = [marks for _, _, kind, marks in plan.get("columns", ()) if kind == "denoiser"]
    if any("?" in each for each in marks):
        return ()
    return tuple(step for step, actions in enumerate(zip(*marks)) if set(actions) != {"r"})


def absent(cell: Cell, pipeline: type | None = None) -> str:
    """Reason why the scheduler, or that class of pipelines, lacks the spacing of a cell; "" where it has it."""
    import diffusers

    kind = getattr(diffusers, cell.scheduler)
    if cell.spacing in _SETTINGS:
        setting = _SETTINGS[cell.spacing]
        return "" if _takes(kind.__init__, setting) else f"{cell.scheduler} takes no {setting}"
    if not cell.spacing.startswith(FULL_STEPS):
        return ""
    own = [name for name in _TABLES if _takes(kind.set_timesteps, name)]
    if not own:
        return f"{cell.scheduler} takes no custom timesteps"
    if pipeline and not any(_takes(pipeline.__call__, name) for name in own):
        return f"{pipeline.__name__} takes no custom {' or '.join(own)}"
    return ""


def _takes(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters


# -- how a pipeline is called with a spacing --------------------------------------------------------------


def scheduler_with(pipe: Any, name: str, spacing: str) -> Any:
    """Make a pipeline's scheduler of that class and spacing; its settings are otherwise those of the present one."""
    scheduler = scheduler_for(pipe, name)
    setting = _SETTINGS.get(spacing)
    return type(scheduler).from_config(scheduler.config, **{setting: True}) if setting else scheduler


def table_of(pipe: Any, scheduler: Any, steps: int, chosen: Sequence[int]) -> dict[str, list[float]]:
    """Make the argument of the pipeline's call that runs only the `chosen` steps of `steps`.

    Raises `BenchError` where neither timesteps nor sigmas lead to exactly these timesteps.
    """
    whole = copy.deepcopy(scheduler)
    whole.set_timesteps(steps)
    if len(whole.timesteps) == steps:
        wanted = whole.timesteps[list(chosen)]
        for name in _TABLES:
            if _takes(type(pipe).__call__, name) and _takes(scheduler.set_timesteps, name):
                values: list[float] = getattr(whole, name)[list(chosen)].tolist()
                if _leads_to(scheduler, {name: values}, wanted):
                    return {name: values}
    raise BenchError(
        f"{type(scheduler).__name__} with {type(pipe).__name__} cannot run {len(chosen)} chosen timesteps of {steps}:"
        " compare with another spacing"
    )


def _leads_to(scheduler: Any, table: dict[str, list[float]], wanted: torch.Tensor) -> bool:
    """Whether the scheduler, given a table, has these timesteps: some shift the values that they are given."""
    trial = copy.deepcopy(scheduler)
    trial.set_timesteps(**table)
    found = trial.timesteps
    return found.shape == wanted.shape and bool((found.double() - wanted.double()).abs().max() < 1e-2)
