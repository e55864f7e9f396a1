"""Installing what intercepts the calls of denoisers and their modules."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Mapping
from typing import Any

from torch import nn

from cachekit.driving.entrance import CallDriver, Entrance
from cachekit.driving.setup import Setup
from cachekit.errors import AttachmentError
from cachekit.runs.call import Call
from cachekit.runs.denoiser import Denoiser
from cachekit.runs.state import RunState
from cachekit.switches.duties import Duties, module_of
from cachekit.switches.prompter import Prompter
from cachekit.switches.switch import Switch
from cachekit.upstream.hooks import refuse_other_caches
from cachekit.upstream.modules import find_module, modules_by_name

#: Held while switches are put in place or taken away: threads may ask for new ones at once.
_CHANGING = threading.RLock()
_IDLE: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class Installation:
    """The entrance of each denoiser and the switches of its modules, by name of the denoiser."""

    def __init__(self, setup: Setup, state: RunState, driver: CallDriver) -> None:
        """Prepare; nothing is changed before `install`."""
        self._is_installed = False
        self._setup = setup
        self._state = state
        self.switches: dict[str, list[Switch]] = {}
        self._entrances = {name: Entrance(driver, denoiser) for name, denoiser in setup.denoisers.items()}
        self._prompters: dict[str, Prompter] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave prompters out of copies, which make their own."""
        return {**vars(self), "_prompters": {}}

    def install(self, duties: Mapping[str, Duties]) -> None:
        """Put everything in place; `duties` are of each denoiser, by its name."""
        self._is_installed = True
        self.serve(duties)
        for entrance in self._entrances.values():
            entrance.install()

    def serve(self, duties: Mapping[str, Duties]) -> None:
        """Put switches before the modules that have a duty and no switch yet; after `uninstall` nothing happens."""
        with _CHANGING:
            if not self._is_installed:
                return
            made = {name: self._missing(name, found) for name, found in duties.items()}
            try:
                for switch in itertools.chain(*made.values()):
                    switch.install()
            except BaseException:
                for switch in itertools.chain(*made.values()):
                    switch.uninstall()
                raise
            for name in (name for name, switches in made.items() if switches):
                # Another thread may be looking through the list of before.
                self.switches[name] = [*self.switches.get(name, []), *made[name]]
        for name, prompter in list(self._prompters.items()):
            if made[name]:  # not while holding the lock: a call that is under way holds the prompter's
                prompter.add(made[name])

    def _missing(self, name: str, duties: Duties) -> list[Switch]:
        """Make the switches that a denoiser lacks for these duties."""
        denoiser, there = self._setup.denoisers[name], {switch.name for switch in self.switches.get(name, [])}
        return [Switch(self._state, module_of(denoiser, each), each) for each in duties if each not in there]

    def uninstall(self) -> None:
        """Put back exactly what was there; a second call does nothing."""
        with _CHANGING:
            self._is_installed = False
            for switch in itertools.chain(*self.switches.values()):
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
            with _CHANGING:  # threads that come here at once share the first one, and its lock
                self._prompters.setdefault(name, Prompter(module, self.switches.get(name, [])))
        return self._prompters[name]


def _is_there(switch: Switch, denoiser: Denoiser, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the denoiser still has the switch's module under its name."""
    if modules.get(switch.name) is switch.module:
        return True
    return find_module(denoiser.module, switch.name) is switch.module
