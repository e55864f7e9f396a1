"""Schedules that decide from tensors of the run."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from cachekit.interface.moment import OPEN, Action, Moment, Streams
from cachekit.interface.parts import Schedule

if TYPE_CHECKING:
    from torch import Tensor

#: What the last call showed, and the sum of the changes since the last full step, in `Moment.memory`.
_SHOWN, _SUM = "shown", "sum"


class Signal(NamedTuple):
    """What an indicator sees of a call.

    At a region: what entered its probe and what left it, `hidden_states` first; nothing has left it yet where the probe
    decides before it runs. At the denoiser: the sample `(branches * batch, channels, ...)` has entered, scaled as the
    denoiser receives it.
    """

    entered: Streams
    left: Streams = ()


class Indicator(Schedule):
    """Decides from a signal of each call whether its target is computed.

    The place determines the signal: `tail` shows the first block, `modulated` the input of the first attention,
    `denoiser` the sample. Memory is changed in `took` alone, which is called for each signal, so steps forced by other
    policies are seen too. An indicator that computes while the sample changes by more than a tenth:

    >>> class Moving(Indicator):
    ...     name = "moving"
    ...     def needs(self, signal: Signal, at: Moment) -> bool:
    ...         (sample,) = signal.entered
    ...         last = at.memory.get("last")
    ...         return last is None or bool((sample - last).abs().mean() > 0.1 * last.abs().mean())
    ...     def took(self, signal: Signal, at: Moment, full: bool) -> None:
    ...         if full:
    ...             at.memory["last"] = signal.entered[0]

    `at.memory` belongs to the target and the branches of the call, and is empty after a branch has been dropped; where
    each branch has a call of its own, the first one's decides at the denoiser. Plans and costs are made without
    signals and with empty memories.
    """

    def full(self, at: Moment) -> bool:
        """Whether the target is computed in this step whatever the signal, as in a warm-up."""
        return False

    def action(self, at: Moment) -> Action | None:
        """STORE in full steps; the others are open."""
        return Action.STORE if self.full(at) else OPEN

    def needs(self, signal: Signal, at: Moment) -> bool:
        """Whether the target must be computed in an open step; changes nothing."""
        raise NotImplementedError

    def took(self, signal: Signal, at: Moment, full: bool) -> None:
        """Take note of a call's signal and of whether the target was computed, in `at.memory` or `at.shared`."""

    def learn(self, output: Streams, signal: Signal, at: Moment) -> None:
        """Take note of what a computed call of the denoiser returned, where the denoiser is the target."""


class Accumulating(Indicator):
    """Full where the changes from step to step, added up since the last full step, reach `threshold`.

    The `first` and the `final` steps of a run are full too. `shown` takes from a signal what is compared, by default
    the output of the probe, or what has entered where nothing has left yet. `change` measures it, by default as
    `relative_change` does. An indicator that follows the sample:

    >>> class Wandering(Accumulating):
    ...     name = "wandering"
    >>> import torch
    >>> wandering, memory = Wandering(threshold=0.5), {}
    >>> for step, value in enumerate([1.0, 1.2, 1.5, 1.8]):
    ...     signal, at = Signal((torch.tensor([value]),)), Moment(step, 4, memory=memory)
    ...     full = wandering.needs(signal, at)
    ...     wandering.took(signal, at, full)
    ...     print(full, round(memory["sum"], 2))
    True 0.0
    False 0.2
    False 0.45
    True 0.0

    The memory has the sum as `sum`.
    """

    threshold: float = Field(ge=0)
    first: int = Field(default=0, ge=0)
    final: int = Field(default=0, ge=0)

    def full(self, at: Moment) -> bool:
        """Whether the step is one of the first or of the last."""
        return at.step < self.first or at.step >= at.steps - self.final

    def shown(self, signal: Signal, at: Moment) -> Tensor:
        """Take what is compared from step to step; it is held until the next one, so copy what others write into."""
        return (signal.left or signal.entered)[0]

    def change(self, new: Tensor, old: Tensor, at: Moment) -> float:
        """Compute what a step adds to the sum; infinity where that isn't known yet."""
        return relative_change(new, old)

    def needs(self, signal: Signal, at: Moment) -> bool:
        """Whether nothing has been shown before, or the sum reaches the threshold or isn't a number."""
        return not self._sum(self.shown(signal, at), at) < self.threshold

    def took(self, signal: Signal, at: Moment, full: bool) -> None:
        """Hold what the step shows, and the sum, which a full step sets to 0."""
        new = self.shown(signal, at)
        at.memory[_SUM] = 0.0 if full or _SHOWN not in at.memory else self._sum(new, at)
        at.memory[_SHOWN] = new

    def _sum(self, new: Tensor, at: Moment) -> float:
        return float(at.memory[_SUM] + self.change(new, at.memory[_SHOWN], at)) if _SHOWN in at.memory else inf


def relative_change(new: Tensor, old: Tensor) -> float:
    """Compute the mean absolute difference of two tensors, relative to the mean absolute value of the old one.

    >>> import torch
    >>> relative_change(torch.tensor([2.0, 3.0]), torch.tensor([2.0, 2.0]))
    0.25
    """
    return float((new - old).abs().mean() / old.abs().mean())
