"""The attachment that `apply` returns: it owns what was changed, and undoes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from cachekit.attaching.lookup import ATTRIBUTE, INSTALLED
from cachekit.attaching.tracking import track, untrack
from cachekit.driving.controlnets import Interceptors
from cachekit.driving.driver import CostFunction, Driver, no_cost, no_fit
from cachekit.driving.setup import Setup
from cachekit.driving.starting import FitFunction
from cachekit.errors import AttachmentError
from cachekit.interface.policy import Policy
from cachekit.planning.plan import Plan
from cachekit.runs.limit import NO_LIMIT, Limit
from cachekit.runs.report import Report
from cachekit.upstream.pipelines import controlnets_of, with_inner
from cachekit.upstream.prediction import times_of
from cachekit.upstream.schedulers import planned_scheduler


class Attachment:
    """Policies attached to the denoisers of a pipeline: their plans, their reports, and their removal.

    It belongs to the denoisers: every pipeline that shares one is cached. Usable as a context manager, which removes
    it at the end. A deep copy of an attached denoiser is attached too, by an attachment of its own.

        with cachekit.apply(pipe, "deepcache:interval=3") as attachment:
            image = pipe("a red cat").images[0]
            print(attachment.report())
    """

    def __init__(
        self,
        setup: Setup,
        limit: Limit = NO_LIMIT,
        cost: CostFunction = no_cost,
        fit: FitFunction = no_fit,
    ) -> None:
        """Prepare; nothing is changed before `install`.

        `cost` counts the MACs of runs, and `fit` chooses what they keep within `limit`.
        """
        self.setup = setup
        self.driver = Driver(setup, limit, cost, fit)
        self._interceptors = Interceptors(self.driver)
        self._is_installed = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, which is installed if the original was."""
        vars(self).update(state)
        self._interceptors.driver = self.driver
        if self._is_installed:
            INSTALLED.add(self)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The policies, in the order of their specs."""
        return self.setup.policies

    # -- attaching and undoing ----------------------------------------------------------------------------

    def install(self, pipe: Any) -> None:
        """Put everything in place that intercepts calls, or change nothing."""
        try:
            self._is_installed = True
            INSTALLED.add(self)
            self.driver.installation.install()
            for denoiser in self.setup.denoisers.values():
                vars(denoiser.module)[ATTRIBUTE] = self
            if not isinstance(pipe, nn.Module):
                for tracked in with_inner(pipe):
                    self.driver.pipelines.add(tracked)
                    track(tracked)
                    self._intercept_controlnets(tracked)
        except BaseException:
            self.remove()
            raise

    def _intercept_controlnets(self, pipe: Any) -> None:
        if len(self.setup.denoisers) > 1:
            return
        (denoiser,) = self.setup.denoisers.values()
        for module in controlnets_of(pipe):
            self._interceptors.install(module, denoiser.module, self.setup.assignments)

    def remove(self) -> None:
        """Put everything back as it was before `apply`; a second call does nothing."""
        self._is_installed = False
        INSTALLED.discard(self)
        self.driver.installation.uninstall()
        for denoiser in self.setup.denoisers.values():
            if vars(denoiser.module).get(ATTRIBUTE) is self:
                del vars(denoiser.module)[ATTRIBUTE]
        self._interceptors.uninstall()
        for pipe in list(self.driver.pipelines):
            untrack(pipe)
        self.driver.end_run(interrupted=True)

    def __enter__(self) -> Attachment:
        """Enter a block at whose end the attachment is removed."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove it."""
        self.remove()

    # -- plans, reports, pauses ---------------------------------------------------------------------------

    def plan(self, num_inference_steps: int, *, guided: bool = True) -> Plan:
        """Plan a run whose loop has `num_inference_steps` iterations, with the pipeline's scheduler as it is set."""
        known = list(self.driver.pipelines)
        scheduler = planned_scheduler(known[0], num_inference_steps) if len(known) == 1 else None
        times = times_of(scheduler, None, num_inference_steps)
        return self.setup.plan_of(num_inference_steps, guided, times)

    def report(self) -> Report:
        """Report on the last run: the present one of this thread, if it has not ended.

        Raises `AttachmentError` before the first run.
        """
        run = self.driver.state.run
        if run is not None:
            return self.driver.report_of(run)
        if self.driver.last_report is None:
            raise AttachmentError("no run yet: call the pipeline, then report()")
        return self.driver.last_report

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run this thread's calls uncached within the block."""
        self.driver.state.paused += 1
        try:
            yield
        finally:
            self.driver.state.paused -= 1

    # -- used by its pipelines ----------------------------------------------------------------------------

    def serves(self, pipe: Any) -> bool:
        """Whether `pipe` has been attached, or has run with an attached denoiser."""
        return pipe in self.driver.pipelines

    def run_of(
        self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Bound the runs of one call of `pipe`."""
        return self.driver.run_of(pipe, args, kwargs)
