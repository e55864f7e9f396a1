"""Instructions for switches in compiled code: made before a call, and read after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cachekit.switches.orders import Order
from cachekit.switches.roles import RUN_IT, AssignedRole, Entry, Restoring, computes
from cachekit.tensors import shape_of, tree_map
from cachekit.upstream.hooks import run_group_offloading

if TYPE_CHECKING:
    from cachekit.interface.moment import Streams
    from cachekit.runs.call import Call


class RegionInputs:
    """The tensors that enter a region in one call: set by its entry, used by its exit."""

    def __init__(self) -> None:
        """Start without tensors."""
        self.streams: Streams = ()


@dataclass
class Instruction:
    """What one switch does in one call of its module, and the output that it sets aside.

    Modules of one structure share compiled code, and torch compiles it again for each new value that it reads. So an
    instruction reads nothing of the call itself: it follows `order`, and returns tensors or sets them aside.
    """

    order: Order
    #: The regions that begin with this module.
    entries: tuple[tuple[Entry, RegionInputs], ...] = ()
    #: Where the module is skipped: its output, or the `Restoring` that makes it from what enters `region`.
    stand_in: Any = None
    region: RegionInputs | None = None
    #: Whether the module was called.
    is_reached: bool = False
    #: The output of the module, or its shapes, as ordered.
    output: Any = None

    def follow(
        self, forward: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run `forward(module, ...)` or skip it."""
        self.is_reached = True
        for entry, region in self.entries:
            region.streams = entry.streams_of(args, kwargs)
        if self.skips:
            run_group_offloading(module)
            return self.stand_in if self.region is None else self.stand_in.output(self.region.streams)
        output = forward(module, *args, **kwargs)
        if self.order is Order.KEEP:
            self.output = output
        elif self.order is Order.MEASURE:
            self.output = tree_map(shape_of, output)
        return output

    @property
    def skips(self) -> bool:
        """Whether the module does not run."""
        return self.order in (Order.REUSE, Order.RESTORE)

    def report(self, roles: Sequence[AssignedRole], call: Call) -> None:
        """Count and keep what was done in `call`, if the module was called."""
        if not self.is_reached:
            return
        # Compiled code may use the memory of its outputs again.
        output = tree_map(torch.clone, self.output) if self.order is Order.KEEP else self.output
        for role in roles:
            if self.skips:
                role.skipped(call)
            else:
                role.after(call, output)


def instruct(
    roles: Sequence[AssignedRole], call: Call | None, regions: Mapping[int, RegionInputs]
) -> Instruction | None:
    """Decide what a module with these roles does in `call`; None where values within the call decide.

    `call` is None where nothing is cached. Without a role the module runs. `regions` holds the inputs of each
    assignment's region.
    """
    if call is None or not roles:
        return Instruction(Order.RUN)
    if any(role.is_open(call) for role in roles):
        return None
    begun = (role for role in roles if isinstance(role, Entry) and not computes(call, role.index))
    entries = tuple((role, regions[role.index]) for role in begun)
    for role in roles:
        stand_in = role.before_compiled(call)
        if isinstance(stand_in, Restoring):
            return Instruction(Order.RESTORE, entries, stand_in, regions[role.index])
        if stand_in is not RUN_IT:
            return Instruction(Order.REUSE, entries, stand_in)
    return Instruction(max(role.needs(call) for role in roles), entries)
