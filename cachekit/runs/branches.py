"""Which guidance branches the calls of a run are for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachekit.interface.adapter import Layout
from cachekit.interface.sites import Branches
from cachekit.runs.clock import Clock

if TYPE_CHECKING:
    from torch import Tensor

#: A denoiser's name, and the branch that a call of it is for.
Caller = tuple[str, str]


class BranchCalls:
    """The layout of a run's branches, the calls made so far, and the outputs of the present step by branch.

    `is_named` is whether the pipeline names its calls after branches.
    """

    def __init__(self, layout: Layout, is_named: bool) -> None:
        """Start before the first call."""
        self.layout = layout
        self.is_named = is_named
        self.outputs: dict[str, Any] = {}
        self.seen: set[Caller] = set()
        self._in_step: list[Caller] = []
        self._called_apart: Layout | None = None
        self._next_layout: Layout | None = None

    @property
    def together(self) -> int:
        """How many branches lie in the batch of one call."""
        return self.layout.together

    def part(self, sample: Tensor, branches: Branches) -> Tensor:
        """Cut a sample `(branches * batch, ...)` down to the one branch that runs; all of it where all do."""
        order = self.layout.order
        return sample if len(branches) == len(order) else sample.chunk(len(order))[order.index(branches[0])]

    def begin_step(self) -> Layout | None:
        """Forget the calls of the last step; return the new layout if it changes with this one."""
        self._in_step.clear()
        self.outputs.clear()
        layout, self._next_layout = self._next_layout, None
        return layout

    def expect_guidance(self, context: str | None) -> None:
        """Plan both branches again from the next step, where guidance begins in a run that began unguided."""
        apart = self._called_apart
        if apart is not None and context in apart.order[1:] and self.layout.order == apart.order[:1]:
            self._next_layout = apart

    def take_as_alone(self) -> Layout:
        """Get the layout of a run whose other branches were never called, and remember the one it had."""
        self._called_apart = self.layout
        return self.layout.alone

    def only_first_called(self, clock: Clock) -> bool:
        """Whether a step is over in which only the first of several branches was called."""
        is_later = clock.step > 0 and clock.call == 0
        return self.layout.separate and is_later and len({branch for _, branch in self.seen}) == 1

    def branch_of(self, call: int, context: str | None) -> str:
        """Get the branch of the `call`-th call of a step: by the pipeline's name for it, or by its place."""
        if not self.layout.separate:
            return context if context and self.is_named and context not in self.layout.order else ""
        return context or self.layout.order[min(call, len(self.layout.order) - 1)]

    def number(self, caller: Caller) -> int:
        """Count a call; get how many like it the step had before."""
        ordinal = self._in_step.count(caller)
        self._in_step.append(caller)
        self.seen.add(caller)
        return ordinal
