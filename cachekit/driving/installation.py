"""Installing what intercepts the calls of denoisers and their modules."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from cachekit.driving.entrance import CallDriver, Entrance
from cachekit.driving.setup import Setup
from cachekit.errors import AttachmentError
from cachekit.interface.sites import Region, Target
from cachekit.runs.call import Call
from cachekit.runs.denoiser import Denoiser
from cachekit.runs.state import RunState
from cachekit.switches.prompter import Prompter
from cachekit.switches.roles import Role, roles_of
from cachekit.switches.switch import Switch
from cachekit.upstream.hooks import refuse_other_caches
from cachekit.upstream.modules import find_module, modules_by_name

_IDLE: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class Installation:
    """The entrance of each denoiser and the switches of its modules, by name of the denoiser."""

    def __init__(self, setup: Setup, state: RunState, driver: CallDriver) -> None:
        """Prepare; nothing is changed before `install`."""
        self._setup = setup
        self._state = state
        self.switches: dict[str, list[Switch]] = {}
        self._entrances = {name: Entrance(driver, denoiser) for name, denoiser in setup.denoisers.items()}
        self._prompters: dict[str, Prompter] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave prompters out of copies, which make their own."""
        return {**vars(self), "_prompters": {}}

    def install(self) -> None:
        """Put everything in place."""
        made = {name: self._make_switches(denoiser) for name, denoiser in self._setup.denoisers.items()}
        for name, switches in made.items():
            for switch in switches:
                self.switches.setdefault(name, []).append(switch)
                switch.install()
            self._entrances[name].install()

    def uninstall(self) -> None:
        """Put back exactly what was there; a second call does nothing."""
        for switches in self.switches.values():
            for switch in switches:
                switch.uninstall()
        self.switches, self._prompters = {}, {}
        for entrance in self._entrances.values():
            entrance.uninstall()

    def check(self) -> None:
        """Raise `AttachmentError` where other code has replaced a switch or enabled another cache."""
        for name, denoiser in self._setup.denoisers.items():
            self._entrances[name].settle()
            modules = modules_by_name(denoiser.module)
            self._prompter(name).find_compiled(modules.values())
            refuse_other_caches(denoiser.module, name, modules.values())
            for switch in self.switches.get(name, []):
                switch.settle()
                if not switch.in_place or not _is_there(switch, denoiser, modules):
                    raise AttachmentError(
                        f"something replaced {switch.name!r} or its forward since apply;"
                        " call cachekit.remove(pipe) and apply again"
                    )

    def prompting(self, name: str, call: Call | None, enclosed: bool) -> contextlib.AbstractContextManager[None]:
        """Instruct the switches for `call`, None for an uncached one, where some of them lie in compiled code."""
        prompter = self._prompter(name)
        return _IDLE if prompter.is_idle(enclosed) else prompter.call(call)

    def _prompter(self, name: str) -> Prompter:
        if name not in self._prompters:
            module = self._setup.denoisers[name].module
            # Threads that come here at once share the first one, and its lock.
            self._prompters.setdefault(name, Prompter(module, self.switches.get(name, [])))
        return self._prompters[name]

    def _make_switches(self, denoiser: Denoiser) -> list[Switch]:
        modules: dict[str, nn.Module] = {}
        roles: dict[str, list[Role]] = {}
        for index, bound in enumerate(self._setup.assignments):
            if bound.is_guidance or bound.is_whole or bound.denoiser != denoiser.name:
                continue
            modules |= _modules_of(denoiser, bound.target)
            for name, role in roles_of(index, bound, modules):
                roles.setdefault(name, []).append(role)
        return [Switch(self._state, modules[name], name, found) for name, found in roles.items()]


def _modules_of(denoiser: Denoiser, target: Target) -> dict[str, nn.Module]:
    """Find the modules of a target by name; raises `AttachmentError` where the denoiser lacks one."""
    names = [target.exit]
    if isinstance(target, Region):
        names += [*target.skipped, *filter(None, (target.entry, target.probe))]
    found = {name: find_module(denoiser.module, name) for name in names}
    for name, module in found.items():
        if module is None:
            raise AttachmentError(
                f"{type(denoiser.module).__name__} has no module {name!r}, named by its adapter; correct the adapter's"
                " sites"
            )
    return {name: module for name, module in found.items() if module is not None}


def _is_there(switch: Switch, denoiser: Denoiser, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the denoiser still has the switch's module under its name."""
    if modules.get(switch.name) is switch.module:
        return True
    return find_module(denoiser.module, switch.name) is switch.module
