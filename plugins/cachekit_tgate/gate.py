"""The gate, at a fixed step or where cross-attention is seen to have converged, and the schedules around it."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar

from cachekit import OPEN, Action, History, Moment, Open, Reuse, Schedule, Streams

if TYPE_CHECKING:
    from torch import Tensor

# What the policy's shared memory holds: the norms of the present step, the greatest change and the most sites of a step
# so far, and the gate once it is chosen.
_NORMS, _GREATEST, _MOST, _GATE = "norms", "greatest", "most", "gate"


class MeasuredReuse(Reuse):
    """The newest output as it is; how far each differs from the one before it is measured for the gate.

    The norms stay on the device: they are read together, once a step.
    """

    name: ClassVar[str] = "measured_reuse"
    watches: ClassVar[bool] = True

    def watch(self, kept: Streams, history: History, at: Moment) -> None:
        """Measure an output against the last one of the same branches, unless the gate is chosen."""
        # The memory is of these branches: after a change of them, the history is not like what was kept.
        if history and at.memory.get("kept") and _GATE not in at.shared:
            gap = at.step - history[0].at.step
            at.shared.setdefault(_NORMS, []).append((at.step, gap, *_norms(kept[0], history[0].tensors[0])))
        at.memory["kept"] = True


class Gate(Schedule):
    """Base of schedules around a gate: step `gate`, or with None the step found by `settled`.

    The gate opens after the first step in which cross-attention outputs change by at most `settled` of their greatest
    change so far: means over sites of the L2 change a step, relative to the output. Steps in which some of the sites
    are skipped are not compared.
    """

    gate: int | None = None
    settled: float

    def is_past(self, at: Moment) -> bool:
        """Whether a step comes after the gate; where the run decides, it does so for all targets at once."""
        if self.gate is not None:
            return at.step >= self.gate
        norms = at.shared.pop(_NORMS, None)
        if norms and self._has_settled(norms, at.shared):
            at.shared[_GATE] = at.step
        gate: int | None = at.shared.get(_GATE)
        return gate is not None and at.step >= gate

    def _has_settled(self, norms: list[Any], shared: dict[str, Any]) -> bool:
        """Compare the change of the last step with the greatest one."""
        shared[_MOST] = most = max(len(norms), shared.get(_MOST, 0))
        if len(norms) < most:
            return False
        change = _mean_change(norms)
        shared.setdefault("trace", []).append((norms[0][0], change))
        if not isfinite(change):
            return False
        greatest: float = max(change, shared.get(_GREATEST, 0.0))
        shared[_GREATEST] = greatest
        return change <= self.settled * greatest


class UntilGate(Gate):
    """Kept in each step before a gate that the run finds, and reused from it on."""

    name: ClassVar[str] = "until_gate"
    summary: ClassVar[str] = "full until cross-attention has converged"

    def action(self, at: Moment) -> Action | Open:
        """Leave every step to the run."""
        return OPEN

    def decide(self, at: Moment) -> Action:
        """Reuse from the gate on."""
        return Action.REUSE if self.is_past(at) else Action.STORE


class AroundGate(Gate):
    """The second version's schedule at self-attention, around the gate.

    Kept at step `warm_up`, then every `before` steps up to the gate and every `after` steps from it on. The last step
    before the gate is kept too, or, where the run finds the gate, the first one after it.
    """

    name: ClassVar[str] = "around_gate"

    before: int
    after: int
    warm_up: int

    def action(self, at: Moment) -> Action | Open:
        """Compute up to the warm-up, then keep every so many steps and reuse between them."""
        return OPEN if self.gate is None else self._action(at, self.gate - 1)

    def decide(self, at: Moment) -> Action:
        """Do the same around a gate that the run finds."""
        return self._action(at, at.step if self.is_past(at) and at.step == at.shared[_GATE] else None)

    def _action(self, at: Moment, last: int | None) -> Action:
        """Decide a step; `last` is the one that is kept for the gate."""
        if at.step == last:
            return Action.STORE
        if self.is_past(at):
            return Action.STORE if at.step % self.after == 0 else Action.REUSE
        if at.step == self.warm_up:
            return Action.STORE
        if at.step < self.warm_up:
            return Action.COMPUTE
        return Action.STORE if at.step % self.before == 0 else Action.REUSE


def _norms(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the L2 norms of the difference of two outputs and of the older one, without reading them."""
    import torch

    return torch.linalg.vector_norm(new.float() - old.float()), torch.linalg.vector_norm(old.float())


def _mean_change(norms: list[Any]) -> float:
    """Compute the mean over sites of the relative change a step, in one reduction that is read once."""
    import torch

    gaps = [gap for _, gap, *_ in norms]
    home = norms[0][2].device
    apart, sizes = (torch.stack([one[place].to(home) for one in norms]) for place in (2, 3))
    return float((apart / sizes / torch.tensor(gaps, device=home)).mean())
