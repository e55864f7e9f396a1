"""End guidance once both branches agree, and run the conditional branch alone (arXiv 2312.12487)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cachekit import OPEN, Action, After, Choice, Drop, Every, Guidance, Linear, Moment, Open, Policy, Reuse, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from cachekit import Observation

_DEFAULT_M = 10


class UntilCrossed(Schedule):
    """Guided until the observed branches agree."""

    name: ClassVar[str] = "until_crossed"
    summary: ClassVar[str] = "full until adaptive guidance has seen the branches agree"

    def action(self, at: Moment) -> Action | Open:
        """Leave every step to the run."""
        return OPEN

    def decide(self, at: Moment) -> Action:
        """Drop the branch from the step after the crossing on."""
        return Action.REUSE if at.shared.get("crossed") else Action.STORE


class AdaptiveGuidance(Policy):
    """Adaptive guidance: both branches run up to some step, the conditional one alone from there on.

    Fixed: the first `m` steps are guided, 10 if neither `m` nor `threshold` is given. Observed: guidance ends after
    the first step whose gamma, the cosine between the conditional and the unconditional prediction, reaches
    `threshold` for every image of the batch; that step is still guided. `space` is what is compared: predictions
    (`eps`) or the clean samples that they imply (`x0`). They are compared every `every` steps. With neither `m` nor
    `threshold`, `every` above 1 guides every so many steps for the whole run, and makes the unconditional output of
    the others from its difference to the conditional one, on a line through the last two.

    `linear` goes on with the last difference instead of dropping guidance: eps = c + (g - 1) (c - u)_kept.
    """

    name: ClassVar[str] = "adaptive_guidance"
    summary: ClassVar[str] = "stop guidance after m steps, or when both branches agree"
    paper: ClassVar[str] = "arXiv 2312.12487"
    exclusive: ClassVar[tuple[str, ...]] = ("m", "threshold")

    m: int | None = Field(None, ge=1)
    threshold: float | None = Field(None, ge=-1, le=1)
    space: Literal["eps", "x0"] = "eps"
    every: int = Field(1, ge=1)
    linear: bool = False

    def choices(self) -> Mapping[str, Choice]:
        """Choose guidance, ended by the fixed or the observed rule, or thinned out."""
        what = Reuse(of="residual") if self.linear else Drop()
        if self.threshold is not None:
            return {"guidance": Choice(Guidance(), UntilCrossed(), what)}
        if self.m is None and self.every > 1:
            return {"guidance": Choice(Guidance(), Every(n=self.every), Linear(of="residual"))}
        return {"guidance": Choice(Guidance(), After(m=self.m or _DEFAULT_M), what)}

    @property
    def observes(self) -> bool:
        """Whether the branches decide."""
        return self.threshold is not None

    def observe(self, seen: Observation, memory: dict[str, Any]) -> None:
        """Record gamma (section 4), and whether it has reached the threshold."""
        if self.threshold is None or seen.step % self.every or len(seen.outputs) < 2:
            return
        gamma = float(self._gamma(seen).min())
        memory.setdefault("trace", []).append((seen.step, gamma))
        memory["crossed"] = gamma >= self.threshold

    def _gamma(self, seen: Observation) -> Tensor:
        """Compute the cosine between both branches `(batch,)`."""
        import torch

        branches = ("cond", "uncond")
        values = [seen.denoised(name) if self.space == "x0" else seen.outputs[name] for name in branches]
        conditional, unconditional = (value.flatten(1).float() for value in values)
        return torch.cosine_similarity(conditional, unconditional)
