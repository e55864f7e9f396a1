"""Support for torch.compile: give each switch its instruction before a call, collect outputs after it."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cachekit.interface.moment import Action
from cachekit.switches.instructions import Instruction, RegionInputs, instruct
from cachekit.switches.orders import Order
from cachekit.upstream.compiling import holds_compiled, keep_graphs

if TYPE_CHECKING:
    from cachekit.runs.call import Call
    from cachekit.switches.roles import AssignedRole
    from cachekit.switches.switch import Switch

#: The combinations of orders that each module was ever called with.
_MODES: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()


class Prompter:
    """Sets the instructions of a denoiser's switches, where some of them lie in compiled code.

    Compiled code can neither count nor look anything up: it would be compiled again for every value that it reads. So
    each switch there reads one order of its own, and returns tensors or sets them aside. As the switches belong to the
    denoiser, calls of several threads take turns.
    """

    def __init__(self, module: nn.Module, switches: Sequence[Switch]) -> None:
        """Serve the `switches` of `module`."""
        self._module = module
        self._lock = threading.RLock()
        self._holds_compiled = False
        self._switches: list[Switch] = []
        self.add(switches)

    def add(self, switches: Sequence[Switch]) -> None:
        """Serve those of these switches that it doesn't yet, from the next call on."""
        with self._lock:
            known = list(dict.fromkeys([*self._switches, *switches]))
            # Outer modules first: where one is skipped, those within need no instruction.
            self._switches = sorted(known, key=lambda switch: switch.name.count("."))
            self._around = {
                switch.name: [other for other in known if switch.name.startswith(other.name + ".")] for switch in known
            }

    def find_compiled(self, modules: Iterable[nn.Module]) -> None:
        """Find out whether any of these, the denoiser's modules, was compiled since the last time."""
        self._holds_compiled = any(map(holds_compiled, modules))

    def is_idle(self, enclosed: bool) -> bool:
        """Whether no compiled code takes part in a call; `enclosed` means that the whole call is being compiled."""
        return not self._holds_compiled and not enclosed

    @contextlib.contextmanager
    def call(self, call: Call | None) -> Iterator[None]:
        """Instruct the switches for `call`, None for an uncached one, and collect their outputs after it."""
        with self._lock:
            try:
                regions = self._instruct(call)
                self._make_room()
                yield
                if call is not None:
                    self._collect(call, regions)
            finally:
                for switch in self._switches:
                    switch.instruction = None

    def _instruct(self, call: Call | None) -> Mapping[int, RegionInputs]:
        regions: defaultdict[int, RegionInputs] = defaultdict(RegionInputs)
        skipped = set()
        for switch in self._switches:
            if any(other.name in skipped for other in self._around[switch.name]):
                skipped.add(switch.name)
                continue
            switch.instruction = instruct(_roles_at(switch, call), call, regions)
            if switch.instruction is not None and switch.instruction.skips:
                skipped.add(switch.name)
        return regions

    def _make_room(self) -> None:
        """Have torch keep as many graphs as it did without cachekit for each combination of orders ever seen.

        The graphs stay when the attachment is removed, and so does the room for them.
        """
        modes = _MODES.setdefault(self._module, {None})
        orders = ((switch.name, _order_of(switch.instruction)) for switch in self._switches)
        modes.add(tuple(order for order in orders if order[1] is not Order.RUN))
        keep_graphs(len(modes))

    def _collect(self, call: Call, regions: Mapping[int, RegionInputs]) -> None:
        for index, region in regions.items():
            if call.actions[index] is Action.STORE:
                # Compiled code may use the memory of its own tensors again.
                call.entries[index] = tuple(map(torch.clone, region.streams))
        for switch in self._switches:
            if switch.instruction is not None:
                switch.instruction.report(_roles_at(switch, call), call)


def _roles_at(switch: Switch, call: Call | None) -> Sequence[AssignedRole]:
    """Find the roles that a switch's module has in a call."""
    duty = None if call is None else call.duties.get(switch.name)
    return () if duty is None else duty.assigned


def _order_of(instruction: Instruction | None) -> Any:
    return None if instruction is None else instruction.order
