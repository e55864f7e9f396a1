"""Installing what intercepts the calls of denoisers and their modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from cachekit.driving.entrance import CallDriver, Entrance
from cachekit.driving.setup import Setup
from cachekit.errors import AttachmentError
from cachekit.interface.sites import Region, Target
from cachekit.runs.call import Call
from cachekit.runs.denoiser import Denoiser
from cachekit.runs.state import RunState
from cachekit.switches.parts import Exit, Part, region_parts
from cachekit.switches.prompter import Prompter
from cachekit.switches.switch import Switch
from cachekit.upstream.hooks import refuse_other_caches
from cachekit.upstream.modules import modules_by_name

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
            self._entrances[name].install()  # again, where something compiled the denoiser since
            modules = modules_by_name(denoiser.module)
            self._prompter(name).find_compiled(modules.values())
            refuse_other_caches(denoiser.module, name, modules.values())
            for switch in self.switches.get(name, []):
                switch.settle()
                if not switch.in_place or modules.get(switch.name) is not switch.module:
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
            self._prompters[name] = Prompter(module, self.switches.get(name, []))
        return self._prompters[name]

    def _make_switches(self, denoiser: Denoiser) -> list[Switch]:
        modules = dict(denoiser.module.named_modules())
        parts: dict[str, list[Part]] = {}
        for index, bound in enumerate(self._setup.assignments):
            if bound.is_guidance or bound.denoiser != denoiser.name:
                continue
            _check_modules(denoiser, bound.target, modules)
            own: Iterable[tuple[str, Part]] = [(bound.target.name, Exit(index, bound))]
            if isinstance(bound.target, Region):
                own = region_parts(index, bound, modules)
            for name, part in own:
                parts.setdefault(name, []).append(part)
        return [Switch(self._state, modules[name], name, found) for name, found in parts.items()]


def _check_modules(denoiser: Denoiser, target: Target, modules: Mapping[str, nn.Module]) -> None:
    """Raise `AttachmentError` for a target of which the denoiser lacks a module."""
    names = [target.exit]
    if isinstance(target, Region):
        names += [*target.skipped, *filter(None, (target.entry, target.probe))]
    for name in names:
        if name not in modules:
            raise AttachmentError(f"{type(denoiser.module).__name__} has no module {name!r}, named by its adapter")
