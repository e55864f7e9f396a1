"""Attach policies to a denoiser, drive its runs, and undo everything exactly."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from cachekit.attaching.lookup import ATTRIBUTE, INSTALLED
from cachekit.attaching.tracking import track, untrack
from cachekit.driving.controlnets import ControlNetInterceptor
from cachekit.driving.driver import Driver
from cachekit.driving.entrance import Entrance
from cachekit.driving.setup import Setup
from cachekit.errors import AttachmentError, CachekitError, CostError
from cachekit.interface.policy import Policy
from cachekit.interface.sites import Kind, Region
from cachekit.planning.plan import Plan
from cachekit.reports.record import Cost, Fit, Record
from cachekit.reports.report import Report
from cachekit.runs.denoiser import Denoiser
from cachekit.runs.limit import Limit
from cachekit.runs.run import Run
from cachekit.runs.start import RunStart
from cachekit.switches.parts import Exit, Part, region_parts
from cachekit.switches.prompter import Prompter
from cachekit.switches.switch import Switch
from cachekit.upstream.hooks import refuse_other_caches
from cachekit.upstream.pipelines import controlnets_of, with_inner

#: Counts what a run cost.
CostFunction = Callable[[Setup, Record], Cost]
#: Plans what a run may keep.
FitFunction = Callable[[Setup, RunStart], Fit]

_NO_LIMIT = Limit()


def _no_cost(setup: Setup, record: Record) -> Cost:
    raise CostError("the costs of this attachment are not counted; use cachekit.apply")


def _no_fit(setup: Setup, start: RunStart) -> Fit:
    return Fit()


class Attachment:
    """Own everything that `apply` changed, and undo it.

    It belongs to the denoisers: every pipeline that shares one is cached. Usable as a context manager.
    """

    def __init__(
        self, setup: Setup, limit: Limit = _NO_LIMIT, cost: CostFunction = _no_cost, fit: FitFunction = _no_fit
    ) -> None:
        """Decide everything; nothing is changed before `install`.

        `cost` counts what a run cost, and `fit` plans what of it fits into `limit`.
        """
        self.setup = setup
        self.driver = Driver(setup, self._check_switches, self._finished, limit, fit)
        self._cost = cost
        self._switches: dict[str, list[Switch]] = {}
        self._entrances = self._make_entrances()
        self._companions: list[ControlNetInterceptor] = []
        self._last: Report | None = None
        setup.catalog.check_plan(setup.plan(50, setup.layout))

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The policies, in the order of their specs."""
        return self.setup.policies

    # -- attaching and undoing ----------------------------------------------------------------------------

    def install(self, pipe: Any) -> None:
        """Put the switches and the classes that begin calls and runs in place, or change nothing."""
        switches = {name: self._make_switches(denoiser) for name, denoiser in self.setup.denoisers.items()}
        try:
            INSTALLED.add(self)
            for name, denoiser in self.setup.denoisers.items():
                for switch in switches[name]:
                    self._switches.setdefault(name, []).append(switch)
                    switch.install()
                vars(denoiser.module)[ATTRIBUTE] = self
                self._entrances[name].install()
                self.driver.prompters[name] = Prompter(denoiser.module, switches[name])
            if not isinstance(pipe, nn.Module):
                for tracked in with_inner(pipe):
                    self.driver.pipes.add(tracked)
                    track(tracked)
                    self._stand_before_companions(tracked)
        except BaseException:
            self.remove()
            raise

    def _stand_before_companions(self, pipe: Any) -> None:
        if len(self.setup.denoisers) > 1:
            return
        (denoiser,) = self.setup.denoisers.values()
        for module in controlnets_of(pipe):
            companion = ControlNetInterceptor(self.driver, module, denoiser.module, self._companions)
            self._companions.append(companion)
            companion.install()

    def remove(self) -> None:
        """Put everything back as it was before `apply`; a second call does nothing."""
        for switch in itertools.chain.from_iterable(self._switches.values()):
            switch.uninstall()
        self._switches, self.driver.prompters = {}, {}
        INSTALLED.discard(self)
        for denoiser in self.setup.denoisers.values():
            if vars(denoiser.module).get(ATTRIBUTE) is self:
                del vars(denoiser.module)[ATTRIBUTE]
        for entrance in self._entrances.values():
            entrance.uninstall()
        for companion in self._companions:
            companion.uninstall()
        self._companions.clear()
        for pipe in list(self.driver.pipes):
            untrack(pipe)
        self.driver.end_run(interrupted=True)

    def __enter__(self) -> Attachment:
        """Return the attachment itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove it."""
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """Return an attachment of the copied denoisers, with no run and no pipeline of its own yet."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin._last, twin._cost = None, self._cost
        twin.setup = copy.deepcopy(self.setup, memo)
        twin.driver = copy.deepcopy(self.driver, memo)
        twin._switches = copy.deepcopy(self._switches, memo)
        # A ControlNet that is copied too brings its own: a copy of the denoiser alone has no need of it.
        twin._companions = memo[id(self._companions)] = []
        # A copied module has lost whatever stood before its calls: torch leaves it out.
        twin._entrances = twin._make_entrances()
        if self in INSTALLED:
            twin._stand_before_calls(memo, self._entrances)
        return twin

    def _stand_before_calls(self, memo: dict[int, Any], copied: Mapping[str, Entrance]) -> None:
        """Do so as the `copied` entrances do for the module that `memo` is about to copy."""
        INSTALLED.add(self)
        for name, entrance in self._entrances.items():
            memo[id(copied[name])], memo[id(copied[name].naming)] = entrance, entrance.naming
            entrance.install()
            self.driver.prompters[name] = Prompter(entrance.denoiser.module, self._switches.get(name, []))

    def _make_entrances(self) -> dict[str, Entrance]:
        return {name: Entrance(self.driver, denoiser) for name, denoiser in self.setup.denoisers.items()}

    def _make_switches(self, denoiser: Denoiser) -> list[Switch]:
        modules = dict(denoiser.module.named_modules())
        parts: dict[str, list[Part]] = {}
        for index, bound in enumerate(self.setup.assignments):
            if bound.target.kind is Kind.GUIDANCE or bound.denoiser != denoiser.name:
                continue
            if isinstance(bound.target, Region):
                for name, part in region_parts(index, bound, modules):
                    parts.setdefault(name, []).append(part)
            else:
                parts.setdefault(bound.target.name, []).append(Exit(index, bound))
        for name in parts:
            if name not in modules:
                raise AttachmentError(f"{type(denoiser.module).__name__} has no module {name!r}, named by its adapter")
        return [Switch(self.driver.state, modules[name], name, found) for name, found in parts.items()]

    def _check_switches(self) -> None:
        for name, denoiser in self.setup.denoisers.items():
            self._entrances[name].install()  # again, where something compiled the denoiser since
            self.driver.prompters[name].find_compiled()
            refuse_other_caches(denoiser.module, name)
            for switch in self._switches.get(name, []):
                switch.settle()
                if not switch.in_place or denoiser.module.get_submodule(switch.name) is not switch.module:
                    raise AttachmentError(
                        f"something replaced {switch.name!r} or its forward since apply;"
                        " call cachekit.remove(pipe) and apply again"
                    )

    # -- what it tells ------------------------------------------------------------------------------------

    def plan(self, num_inference_steps: int, *, guided: bool = True) -> Plan:
        """Return the table of actions of a run whose loop has `num_inference_steps` iterations."""
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise CachekitError(f"num_inference_steps={num_inference_steps!r}: give a whole number of at least 1")
        layout = self.setup.layout
        return self.setup.plan(num_inference_steps, layout if guided else layout.alone)

    def report(self) -> Report:
        """Return what the last run did: the present one of this thread, if it has not ended."""
        run = self.driver.state.run
        if run is not None and run.batch:
            return self._report(run)
        if self._last is None:
            raise AttachmentError("no run yet: call the pipeline, then report()")
        return self._last

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run this thread's calls uncached within the block."""
        self.driver.state.paused += 1
        try:
            yield
        finally:
            self.driver.state.paused -= 1

    def serves(self, pipe: Any) -> bool:
        """Whether `pipe` has been attached, or has run with an attached denoiser."""
        return pipe in self.driver.pipes

    def run_of(
        self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Return the bounds of one run, a call of `pipe`."""
        return self.driver.run_of(pipe, args, kwargs)

    def _finished(self, run: Run) -> None:
        state = self.driver.state
        self._last = self._report(run)
        self._last.earlier = state.reports
        if state.pipeline is not None:
            state.reports = (*state.reports, self._last)
        run.forget()
        if not run.record.interrupted:
            self.setup.catalog.run_finished(self._last)

    def _report(self, run: Run) -> Report:
        return Report(self.setup.assignments, run.finish(), functools.partial(self._cost, self.setup))
