"""The attachment that `apply` returns: it owns what was changed, and undoes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from types import EllipsisType
from typing import Any

from torch import nn

from cachekit.attaching.lookup import ATTRIBUTE, INSTALLED
from cachekit.attaching.tracking import track, untrack
from cachekit.driving.controlnets import Interceptors
from cachekit.driving.driver import CostFunction, Driver, no_cost, no_fit
from cachekit.driving.evidence import warn_of_pipeline
from cachekit.driving.scopes import Regime, Scope, no_run
from cachekit.driving.setup import Setup
from cachekit.driving.starting import Fitting
from cachekit.errors import AttachmentError
from cachekit.interface.policy import Policy
from cachekit.interface.specs import Spec, read_all
from cachekit.models.architectures import guided_by_default
from cachekit.planning.plan import Plan
from cachekit.runs.limit import NO_LIMIT, Limit
from cachekit.runs.report import Report
from cachekit.upstream.pipelines import controlnets_of, with_inner
from cachekit.upstream.prediction import planned_times


class Attachment:
    """Policies attached to the denoisers of a pipeline: their plans, their reports, and their removal.

    It belongs to the denoisers: every pipeline that shares one is cached. Usable as a context manager, which removes
    it at the end. A deep copy of an attached denoiser is attached too, by an attachment of its own.

    >>> import cachekit
    >>> pipe = cachekit.demo_pipeline()
    >>> pipe.set_progress_bar_config(disable=True)
    >>> with cachekit.apply(pipe, "deepcache:interval=2") as attachment:
    ...     image = pipe("a large red circle top left on white", num_inference_steps=6).images[0]
    ...     report = attachment.report()
    >>> report.calls, [str(count) for count in report.counts]
    (6, ['deepcache:interval=2 block x 1: ran 3 times, 3 of them kept, reused 3'])
    """

    def __init__(
        self,
        setup: Setup,
        limit: Limit = NO_LIMIT,
        cost: CostFunction = no_cost,
        fitting: Fitting = no_fit,
    ) -> None:
        """Prepare; nothing is changed before `install`.

        `cost` counts the MACs of runs, and `fitting` makes what fits them into a limit.
        """
        self.setup = setup
        self.driver = Driver(setup, limit, cost, fitting)
        self._interceptors = Interceptors(self.driver)
        self._is_installed = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, which is installed if the original was."""
        vars(self).update(state)
        self._interceptors.driver = self.driver
        if self._is_installed:
            INSTALLED.add(self)

    def __repr__(self) -> str:
        """Summarise in a line what is applied to what."""
        specs = " + ".join(map(str, self.policies)) or "no policy"
        names = " and ".join(type(denoiser.module).__name__ for denoiser in self.setup.denoisers.values())
        return f"<Attachment: {specs} on {names}{'' if self._is_installed else ', removed'}>"

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The policies applied, in the order of their specs."""
        return self.setup.policies

    # -- attaching and undoing ----------------------------------------------------------------------------

    def install(self, pipe: Any) -> None:
        """Put everything in place that intercepts calls, or change nothing."""
        try:
            self._is_installed = True
            INSTALLED.add(self)
            self.driver.installation.install(self.driver.scopes.applied.regime.duties)
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
            self._interceptors.install(module, denoiser.module)
        self._interceptors.follow(self.setup.assignments)

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

    # -- other policies for some runs ---------------------------------------------------------------------

    @contextlib.contextmanager
    def using(
        self,
        specs: Spec | Iterable[Spec],
        *,
        max_cache_bytes: int | EllipsisType | None = ...,
        cache_device: Any = ...,
    ) -> Iterator[Scope]:
        """Have the runs that begin within the block follow other specs than those applied.

            with attachment.using("forecast:interval=4") as block:
                image = pipe("a large red circle top left on white").images[0]
            print(block.report())

        `specs` are as for `apply`; `[]` caches nothing, and still reports. Limits that are not given are those of the
        block around it, or of `apply`; None lifts one. Blocks hold for runs of this thread or asyncio task alone, also
        in threads that `asyncio.to_thread` starts from it, and can be nested.

        Raises a `CachekitError` as `apply` does, and then nothing has changed; `AttachmentError` after `remove`.
        """
        if not self._is_installed:
            raise AttachmentError("this attachment was removed: call cachekit.apply(pipe, specs) again")
        regime = self._regime(specs, max_cache_bytes, cache_device)
        with self.driver.scopes.enter(regime) as scope:
            yield scope

    def _regime(self, specs: Spec | Iterable[Spec], max_cache_bytes: Any, cache_device: Any) -> Regime:
        """Find what runs follow with these specs, or make it and put in place what it needs."""
        scopes = self.driver.scopes
        outer = scopes.entered.regime.limit
        max_bytes = outer.max_bytes if max_cache_bytes is ... else max_cache_bytes
        limit = Limit.of(max_bytes, outer.device if cache_device is ... else cache_device)
        policies, presets = read_all(specs, self.setup.catalog)
        found = scopes.find(policies, presets, limit)
        if found is not None:
            return found
        made = scopes.make(policies, presets, limit)
        self.driver.installation.serve(made.duties)
        self._interceptors.follow(made.setup.assignments)
        scopes.hold(made)
        denoiser = next(iter(self.setup.denoisers.values())).module
        for preset in presets:
            warn_of_pipeline(preset, next(iter(list(self.driver.pipelines)), denoiser), denoiser)
        return made

    # -- plans, reports, pauses ---------------------------------------------------------------------------

    def plan(self, num_inference_steps: int, *, guided: bool | None = None) -> Plan:
        """Plan a run: of a pipeline called with `num_inference_steps`, or of a bare loop of so many iterations.

        The pipeline's scheduler gives the number of iterations: with Heun, 6 steps are 11. Within a `using` block the
        plan is of its specs. `guided` is whether the run has guidance branches; by default it has, unless the guidance
        scale is an input of the denoiser, or the model was published without guidance.
        """
        known = list(self.driver.pipelines)
        iterations, times = planned_times(known[0] if len(known) == 1 else None, num_inference_steps)
        setup = self.driver.scopes.entered.regime.setup
        if guided is None:
            models = known if len(known) == 1 else [denoiser.module for denoiser in setup.denoisers.values()]
            guided = all(map(guided_by_default, models))
        return setup.plan_of(iterations, guided, times)

    def report(self) -> Report:
        """Report on the last run of this thread, whether it has ended or not; if it made none, of any thread.

        Raises `AttachmentError` before the first run.
        """
        run = self.driver.state.run
        if run is not None:
            return self.driver.report_of(run)
        found = self.driver.state.report or self.driver.last_report
        if found is None:
            raise no_run()
        return found

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
