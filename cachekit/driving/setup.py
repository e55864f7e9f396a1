"""What is attached: denoisers, policies, and what each policy acts on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from cachekit.errors import CachekitError, PolicyError, SiteError, answered, attributed
from cachekit.interface.adapter import Layout
from cachekit.interface.indicators import Indicator
from cachekit.interface.moment import Time
from cachekit.interface.parts import Schedule, StandIn, Where, credited
from cachekit.interface.policy import Policy
from cachekit.interface.presets import Preset
from cachekit.interface.sites import Region, Site, SiteMap, Target
from cachekit.planning.assignments import Assignment, assign
from cachekit.planning.plan import Plan, make_plan
from cachekit.registry.catalog import Catalog
from cachekit.runs.denoiser import Denoiser

#: The number of steps of the plan that plugins check.
_CHECKED_STEPS = 50
#: Most plans that are held; each size of a picture may have times of its own.
_MOST_PLANS = 64


@dataclass(frozen=True)
class Setup:
    """The denoisers of a pipeline by name, the policies on them, and the catalog of policies and adapters.

    `presets` are those that the policies come from.
    """

    denoisers: dict[str, Denoiser]
    policies: tuple[Policy, ...]
    assignments: tuple[Assignment, ...]
    catalog: Catalog
    presets: tuple[Preset, ...] = ()
    _plans: dict[tuple[Any, ...], Plan] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        modules: Mapping[str, nn.Module],
        policies: Sequence[Policy],
        catalog: Catalog,
        presets: Sequence[Preset] = (),
    ) -> Setup:
        """Choose an adapter for each module and the targets of each policy.

        Raises a `CachekitError` where an adapter or a target is missing, policies collide or a plugin refuses the plan.
        """
        denoisers = {name: Denoiser.of(name, module, catalog.adapter_for(module)) for name, module in modules.items()}
        return cls(denoisers, (), (), catalog).following(policies, presets)

    def following(self, policies: Sequence[Policy], presets: Sequence[Preset] = ()) -> Setup:
        """Put other policies on the same denoisers; raises as `of` does."""
        chosen = (bound for policy in policies for bound in _select(policy, self.denoisers))
        setup = Setup(self.denoisers, tuple(policies), assign(chosen), self.catalog, tuple(presets))
        self.catalog.check_plan(setup.plan(_CHECKED_STEPS, setup.layout))
        return setup

    def on(self, modules: Mapping[str, nn.Module]) -> Setup:
        """Put the same policies on copies of the denoisers, given by name."""
        return replace(self, denoisers={name: replace(self.denoisers[name], module=modules[name]) for name in modules})

    @property
    def layout(self) -> Layout:
        """How the guidance branches reach the first denoiser."""
        return next(iter(self.denoisers.values())).layout

    @functools.cached_property
    def narrowing(self) -> list[Assignment]:
        """The assignments that may drop a guidance branch."""
        return [bound for bound in self.assignments if bound.is_guidance]

    @functools.cached_property
    def beginning(self) -> list[tuple[int, list[Schedule | StandIn]]]:
        """The parts that do something at the beginning of a run, by index of the assignment."""
        parts = [[it for it in (bound.choice.when, bound.choice.what) if _begins(it)] for bound in self.assignments]
        return [(index, found) for index, found in enumerate(parts) if found]

    @functools.cached_property
    def reading(self) -> list[Assignment]:
        """The assignments whose stand-ins read values of the scheduler."""
        return [bound for bound in self.assignments if bound.choice.what.reads]

    @functools.cached_property
    def observing(self) -> list[Policy]:
        """The policies that look at the outputs of guidance branches."""
        return [policy for policy in self.policies if policy.observes]

    def plan_of(self, num_inference_steps: int, guided: bool, times: tuple[Time, ...] = ()) -> Plan:
        """Plan a run as users describe it; raises `CachekitError` unless there is at least one step."""
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise CachekitError(f"num_inference_steps={num_inference_steps!r}: give a whole number of at least 1")
        return self.plan(num_inference_steps, self.layout if guided else self.layout.alone, times=times)

    def plan(
        self, steps: int, layout: Layout, dropped: frozenset[int] = frozenset(), times: tuple[Time, ...] = ()
    ) -> Plan:
        """Plan a run of `steps` steps whose branches come as `layout` says; `dropped` assignments compute."""
        key = (steps, layout, dropped, times)
        if key not in self._plans:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.pop(next(iter(self._plans)), None)
            self._plans[key] = make_plan(self.assignments, *key)
        return self._plans[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> Setup:
        """Copy the denoisers; all else is immutable and shared."""
        twin = replace(self, denoisers={})
        memo[id(self)] = twin
        twin.denoisers.update(copy.deepcopy(self.denoisers, memo))
        return twin


def _select(policy: Policy, denoisers: Mapping[str, Denoiser]) -> list[Assignment]:
    """Bind the policy to its targets in each denoiser; a denoiser without any is left out if another has some."""
    found: list[Assignment] = []
    refusals: list[SiteError] = []
    for name, denoiser in denoisers.items():
        try:
            found += bind(policy, name, denoiser.sites)
        except SiteError as error:
            refusals.append(error)
    if len(refusals) == len(denoisers):
        raise refusals[0]
    return found


def bind(policy: Policy, denoiser: str, sites: SiteMap) -> list[Assignment]:
    """Bind each of the policy's choices to its targets; raises `SiteError` for one that it can't act on."""
    found: list[Assignment] = []
    choices = policy.chosen().values()
    for choice in choices:
        for target in _found(policy, choice.where, sites):
            bound = Assignment(policy, choice, target, denoiser)
            reason = _refusal(bound)
            if reason:
                raise SiteError(f"{policy}: {reason}")
            found.append(bound)
    if not found and choices:
        raise SiteError(f"{policy}: found nothing to act on, but {sites.describe()}; use another policy")
    return found


def _found(policy: Policy, where: Where, sites: SiteMap) -> Sequence[Target]:
    """Ask a place for its targets, and check the answer."""
    try:
        targets = answered(lambda: f"{attributed(policy)}: find of {credited(where, policy)}", where.find, sites)
    except SiteError as error:
        raise SiteError(f"{policy}: {error}") from None
    if not isinstance(targets, (list, tuple)) or not all(isinstance(target, (Site, Region)) for target in targets):
        place = credited(where, policy)
        raise PolicyError(
            f"{attributed(policy)}: find of {place} returned {targets!r}; return a list of sites and regions"
        )
    return targets


def _refusal(bound: Assignment) -> str:
    """Reason why a choice doesn't fit its target, and the remedy; "" if it fits."""
    what, when, target = bound.choice.what, bound.choice.when, bound.target
    if what.entries == 0 and not bound.is_guidance:
        return f"{what} keeps nothing, which makes sense at guidance alone; use another stand-in at {target.name!r}"
    if what.of == "x0" and not bound.is_whole:
        return f"of=x0 makes sense at the denoiser alone; use of=output or of=residual at {target.name!r}"
    if what.amends and not bound.is_whole:
        return f"{what} corrects outputs of the denoiser alone; use another stand-in at {target.name!r}"
    if isinstance(when, Indicator) and not bound.is_whole and not _shows(target):
        return f"{when} decides from a signal, which {target.name!r} lacks; use where=tail, modulated or denoiser"
    if what.of == "residual" and isinstance(target, Region) and not target.streams:
        where = (
            f"what enters and leaves {target.entry!r} is not known" if target.entry else "its output has another shape"
        )
        return f"{target.name!r} has no residual, {where}; use of=output or another policy"
    return ""


def _begins(part: Schedule | StandIn) -> bool:
    """Whether a part does anything at the beginning of a run."""
    return type(part).begin not in (Schedule.begin, StandIn.begin)


def _shows(target: Target) -> bool:
    """Whether a target has a probe, which shows its calls to an indicator."""
    return isinstance(target, Region) and bool(target.probe)
