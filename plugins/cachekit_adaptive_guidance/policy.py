"""End guidance once both branches agree, and run the conditional branch alone (arXiv 2312.12487)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from cachekit import OPEN, Action, Kind, Moment, Policy, Target

if TYPE_CHECKING:
    from torch import Tensor

    from cachekit import Observation

_DEFAULT_M = 10


class AdaptiveGuidance(Policy):
    """Adaptive guidance: both branches run up to some step, the conditional one alone from there on.

    Fixed: the first `m` steps are guided, 10 if neither `m` nor `threshold` is given. Observed: guidance ends after
    the first step whose gamma, the cosine between the conditional and the unconditional prediction, reaches
    `threshold` for every image of the batch; that step is still guided. `space` is what is compared: predictions
    (`eps`) or the clean samples that they imply (`x0`). They are compared every `every` steps. `linear` goes on with
    the last difference between the branches instead of dropping guidance: eps = c + (g - 1) (c - u)_kept.
    """

    name: ClassVar[str] = "adaptive_guidance"
    summary: ClassVar[str] = "stop guidance after m steps, or when both branches agree"
    paper: ClassVar[str] = "arXiv 2312.12487"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.GUIDANCE})

    m: int | None = Field(None, ge=1)
    threshold: float | None = Field(None, ge=-1, le=1)
    space: Literal["eps", "x0"] = "eps"
    every: int = Field(1, ge=1)
    linear: bool = False

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.m is not None and self.threshold is not None:
            raise ValueError("m and threshold exclude each other; give one of them")
        return self

    def action(self, target: Target, at: Moment) -> Action | None:
        """Guide the first `m` steps; with a threshold every step is open."""
        if self.threshold is not None:
            return OPEN
        m = self.m or _DEFAULT_M
        if at.step >= m:
            return Action.REUSE
        return Action.STORE if self.linear and at.step == m - 1 else Action.COMPUTE

    def decide(self, target: Target, at: Moment, memory: dict[str, Any]) -> Action:
        """Drop the unconditional branch from the step after the crossing on."""
        if memory.get("crossed"):
            return Action.REUSE
        return Action.STORE if self.linear else Action.COMPUTE

    @property
    def observes(self) -> bool:
        """Whether the branches decide."""
        return self.threshold is not None

    def observe(self, seen: Observation, memory: dict[str, Any]) -> None:
        """Record gamma (section 4), and whether it has reached the threshold."""
        if self.threshold is None or seen.step % self.every:
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

    def branches_to_keep(self, outputs: Mapping[str, Tensor]) -> Tensor | None:
        """Keep the difference c - u `(batch, channels, ...)` for the linear variant."""
        return outputs["cond"] - outputs["uncond"] if self.linear else None

    def restore_branch(self, output: Tensor, kept: Tensor | None) -> Tensor:
        """Make u = c - (c - u)_kept, or take c for it: guidance then gives c."""
        return output if kept is None else output - kept
