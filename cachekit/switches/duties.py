"""What each module of a denoiser does for one set of policies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from cachekit.errors import AttachmentError, PolicyError, attributed
from cachekit.interface.parts import credited
from cachekit.interface.sites import Region, SiteMap, Target
from cachekit.planning.assignments import Assignment
from cachekit.runs.denoiser import Denoiser
from cachekit.switches.roles import RUN_IT, AssignedRole, Role, roles_of
from cachekit.upstream.hooks import run_group_offloading
from cachekit.upstream.modules import find_module


class Duty:
    """The roles of one module. It never changes, so that runs, threads and copies of a model share it."""

    __slots__ = ("always_asks", "assigned", "counted", "indices", "roles")

    def __init__(self, roles: Sequence[Role]) -> None:
        """Sort the roles by what their switch asks of them."""
        self.roles = tuple(roles)
        self.assigned = tuple(role for role in roles if isinstance(role, AssignedRole))
        #: The assignments that have a role here, and those whose calls are counted here.
        self.indices = tuple({role.index: None for role in self.assigned})
        self.counted = tuple(role.index for role in self.assigned if role.is_counted)
        self.always_asks = len(self.assigned) < len(roles)

    def fulfil(
        self, call: Any, forward: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the module, unless a role has a stand-in for its output."""
        for role in self.roles:
            stand_in = role.before(call, args, kwargs)
            if stand_in is not RUN_IT:
                role.skipped(call)
                run_group_offloading(module)
                return stand_in
        output = forward(module, *args, **kwargs)
        for role in self.roles:
            role.after(call, output)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Duty:
        """Share the duty: it holds no module."""
        return self


#: The duties of a denoiser's modules, by their names; modules without one are left out.
Duties = Mapping[str, Duty]


def duties_of(assignments: Sequence[Assignment], denoiser: Denoiser) -> Duties:
    """List the duties that the targets of `assignments` give to the modules of one denoiser.

    Raises `AttachmentError` where the denoiser lacks a module.
    """
    modules: dict[str, nn.Module] = {}
    roles: dict[str, list[Role]] = {}
    for index, bound in enumerate(assignments):
        if bound.is_guidance or bound.is_whole or bound.denoiser != denoiser.name:
            continue
        modules.update(_modules_of(denoiser, bound))
        for name, role in roles_of(index, bound, modules):
            roles.setdefault(name, []).append(role)
    return {name: Duty(found) for name, found in roles.items()}


def _modules_of(denoiser: Denoiser, bound: Assignment) -> dict[str, nn.Module]:
    """Find the modules of a target by name; raises `PolicyError` for one that its place alone has named."""
    found = {}
    for name in _names_of(bound.target):
        module = find_module(denoiser.module, name)
        if module is None and name not in _named_by_adapter(denoiser.sites):
            place = credited(bound.choice.where, bound.policy)
            raise PolicyError(
                f"{attributed(bound.policy)}: find of {place} chose {name!r}, a module that"
                f" {type(denoiser.module).__name__} doesn't have; choose among the sites that it is given"
            )
        found[name] = module_of(denoiser, name) if module is None else module
    return found


def _names_of(target: Target) -> list[str]:
    """List the modules of a target."""
    if not isinstance(target, Region):
        return [target.exit]
    return [target.exit, *target.skipped, *filter(None, (target.entry, target.probe))]


def _named_by_adapter(sites: SiteMap) -> set[str]:
    targets: tuple[Target, ...] = (*sites.sites, *sites.regions, *itertools.chain(*sites.chains))
    return {name for target in targets for name in _names_of(target)}


def module_of(denoiser: Denoiser, name: str) -> nn.Module:
    """Find a module that an adapter names; raises `AttachmentError` where there is none."""
    found = find_module(denoiser.module, name)
    if found is None:
        model = type(denoiser.module).__name__
        raise AttachmentError(f"{model} has no module {name!r}, named by its adapter; correct the adapter's sites")
    return found
