"""Fit runs into a byte budget: choose before each run what it doesn't keep."""

from __future__ import annotations

from typing import Any

import torch

from cachekit.costs.rehearsal import Rehearsal, Usage
from cachekit.driving.setup import Setup
from cachekit.driving.starting import RunStart
from cachekit.errors import BudgetError, CostError, PolicyError
from cachekit.planning.plan import Plan
from cachekit.runs.limit import Limit
from cachekit.runs.record import Fit
from cachekit.runs.voting import vote_of


class Fitter:
    """Chooses which assignments keep nothing, once for each kind of run, so that the rest stays within a limit."""

    def __init__(self, limit: Limit) -> None:
        """Fit runs into `limit`."""
        self._limit = limit
        self._fits: dict[tuple[Any, ...], Fit] = {}

    def __call__(self, setup: Setup, start: RunStart) -> Fit:
        """Choose what the run that begins with `start` doesn't keep.

        Raises `BudgetError` where nothing fits, or where the bytes can't be foreseen: processes share the image, the
        denoiser doesn't run on the meta device, or a policy looks at values to choose what it keeps.
        """
        if self._limit.max_bytes is None or not setup.assignments:
            return Fit()
        if vote_of(start.denoiser.module).group is not None:
            raise BudgetError("max_cache_bytes cannot be planned for where processes share an image; leave it out")
        if start.key not in self._fits:
            self._fits[start.key] = _rehearse_and_fit(setup, start, self._limit.max_bytes)
        return self._fits[start.key]


def _rehearse_and_fit(setup: Setup, start: RunStart, max_bytes: int) -> Fit:
    try:
        with torch.inference_mode(False), torch.no_grad():
            return fit(Rehearsal(setup, start), max_bytes)
    except (CostError, PolicyError, NotImplementedError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BudgetError(f"max_cache_bytes cannot be planned for: {reason}; leave it out") from error


def fit(rehearsal: Rehearsal, max_bytes: int) -> Fit:
    """Drop the assignments that save the fewest MACs per byte until the rehearsed run keeps at most `max_bytes`."""
    plan = rehearsal.plan()
    usage = unlimited = rehearsal.usage(plan)
    dropped: frozenset[int] = frozenset()
    room = max_bytes
    while usage.peak > max_bytes:
        kept = _most_valuable(unlimited, rehearsal.savings(plan), room)
        if not kept:
            raise _nothing_fits(plan, unlimited, max_bytes)
        dropped = unlimited.keeping - kept
        # The plan without them stores at other steps and may need more within a call: then aim lower.
        usage = rehearsal.usage(rehearsal.plan(dropped))
        room -= max(usage.peak - max_bytes, 0)
    return Fit(dropped, unlimited.peak)


def _most_valuable(usage: Usage, savings: dict[int, float], room: int) -> frozenset[int]:
    """Choose assignments that fit into `room` bytes together, those with the highest savings per byte first."""
    kept: frozenset[int] = frozenset()
    for index in sorted(usage.keeping, key=lambda index: (-savings.get(index, 0) / usage.most(index), index)):
        if usage.most_together(kept | {index}) <= room:
            kept |= {index}
    return kept


def _nothing_fits(plan: Plan, usage: Usage, max_bytes: int) -> BudgetError:
    smallest = min(usage.most(index) for index in usage.keeping)
    specs = ", ".join(dict.fromkeys(repr(str(bound.policy)) for bound in plan.assignments))
    return BudgetError(
        f"max_cache_bytes={max_bytes:,}: nothing of {specs} fits; the smallest place needs {smallest:,} bytes,"
        f" all of them {usage.peak:,}; raise it, or leave it out"
    )
