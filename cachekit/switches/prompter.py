"""Support torch.compile: set each switch's order before a call, collect outputs after it."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch._dynamo
from torch import nn

from cachekit.upstream.compiling import graph_limit, graphs_before, holds_compiled

if TYPE_CHECKING:
    from cachekit.runs.call import Call
    from cachekit.switches.switch import Switch


_ORDERS: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()


class Prompter:
    """Tell the switches of one denoiser what to do in a call, where some of them may lie in compiled code.

    Compiled code can neither count nor look anything up: whatever it looked at, it would be compiled anew for. So
    each switch there reads one word of its own, and hands out or notes down tensors. As the switches belong to the
    denoiser, calls of several threads take turns.
    """

    def __init__(self, module: nn.Module, switches: Sequence[Switch]) -> None:
        """Serve the `switches` of `module`."""
        self._module = module
        # Whatever lies around a switch comes before it.
        self._switches = sorted(switches, key=lambda switch: switch.name.count("."))
        self._around = {
            switch.name: [other for other in switches if switch.name.startswith(other.name + ".")]
            for switch in switches
        }
        self._lock = threading.RLock()
        self._holds_compiled = False

    def look(self) -> None:
        """Notice what has been compiled in the module since the last time."""
        self._holds_compiled = any(map(holds_compiled, self._module.modules()))

    @contextlib.contextmanager
    def call(self, call: Call | None, enclosed: bool) -> Iterator[None]:
        """Tell the switches what to do in `call`, None being plain, and take what they noted.

        `enclosed` says that the whole call is being compiled.
        """
        if not self._holds_compiled and not enclosed:
            yield
            return
        with self._lock:
            try:
                self._tell(call)
                self._make_room()
                yield
                self._ask(call)
            finally:
                for switch in self._switches:
                    switch.forget()

    def _tell(self, call: Call | None) -> None:
        skipped = set()
        for switch in self._switches:
            if any(other.name in skipped for other in self._around[switch.name]) or switch.tell(call):
                skipped.add(switch.name)

    def _make_room(self) -> None:
        """Let torch keep as many graphs as before for each combination of orders that the module has ever seen.

        The graphs stay when the attachment is removed, and so does the room for them.
        """
        seen = _ORDERS.setdefault(self._module, {None})
        seen.add(tuple((switch.name, switch.order) for switch in self._switches))
        wanted = graphs_before() * len(seen)
        if getattr(torch._dynamo.config, graph_limit()) < wanted:
            setattr(torch._dynamo.config, graph_limit(), wanted)

    def _ask(self, call: Call | None) -> None:
        if call is not None:
            for switch in self._switches:
                switch.report(call)
