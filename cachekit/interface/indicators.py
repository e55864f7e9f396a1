"""Schedules that decide from tensors of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cachekit.interface.moment import OPEN, Action, Moment, Streams
from cachekit.interface.parts import Schedule

if TYPE_CHECKING:
    from torch import Tensor


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


def relative_change(new: Tensor, old: Tensor) -> float:
    """Compute the mean absolute difference of two tensors, relative to the mean absolute value of the old one."""
    return float((new - old).abs().mean() / old.abs().mean())
