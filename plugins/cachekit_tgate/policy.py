"""Keep cross-attention outputs once they have converged, and drop a guidance branch (arXiv 2404.02747)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cachekit import Action, BranchChange, Kind, Moment, Policy, SiteMap, Target

if TYPE_CHECKING:
    from cachekit import Layout

#: The branch that runs on after the gate.
Keep = Literal["auto", "cond", "uncond"]


class Gated(Policy):
    """The rule of TGATE for a gate at step `gate`; subclasses have the fields."""

    paper: ClassVar[str] = "arXiv 2404.02747"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.CROSS_ATTENTION, Kind.SELF_ATTENTION, Kind.GUIDANCE})
    # Equation 6 keeps the mean of the conditional and the unconditional output.
    on_branch_change: ClassVar[BranchChange] = BranchChange.MEAN

    @property
    def gate(self) -> int:
        """The first step after the gate, which is the number of guided steps."""
        raise NotImplementedError

    @property
    def self_attention(self) -> tuple[int, int, int]:
        """How self-attention is reused: (sp_interval, fi_interval, warm_up), all in steps."""
        return (1, 1, 0)

    def select(self, sites: SiteMap) -> Sequence[Target]:
        """Choose guidance and cross-attention, and self-attention if an interval reuses it."""
        if not sites.of(Kind.CROSS_ATTENTION):
            raise self._refusal(sites)
        reuses = self.self_attention[:2] != (1, 1)
        return [site for site in sites.of(*self.kinds) if site.kind is not Kind.SELF_ATTENTION or reuses]

    def action(self, target: Target, at: Moment) -> Action:
        """Follow section 4.2 of the paper, and the second version at self-attention."""
        if target.kind is Kind.GUIDANCE:
            return Action.COMPUTE if at.step < self.gate else Action.REUSE
        if target.kind is Kind.CROSS_ATTENTION:
            if at.step == self.gate - 1:
                return Action.STORE
            return Action.COMPUTE if at.step < self.gate else Action.REUSE
        return self._self_attention(at.step)

    def _self_attention(self, step: int) -> Action:
        before, after, warm_up = self.self_attention
        if step >= self.gate:
            return Action.STORE if step % after == 0 else Action.REUSE
        if step in (warm_up, self.gate - 1):
            return Action.STORE
        if step < warm_up:
            return Action.COMPUTE
        return Action.STORE if step % before == 0 else Action.REUSE

    def _refusal(self, sites: SiteMap) -> Exception:
        from cachekit import SiteError

        cure = "delta_dit or " if sites.chains else "deepcache or " if sites.regions else ""
        return SiteError(
            f"{self}: looked for cross_attention, but {sites.describe()}; TGATE needs text in an attention of its"
            f" own: use {cure}adaptive_guidance"
        )


class Tgate(Gated):
    """TGATE: the first `m` steps are guided, the others reuse their cross-attention and run one branch.

    The cross-attention outputs of step m - 1 serve from step m on. Self-attention is kept at step `warm_up`, then
    recomputed every `sp_interval` steps before the gate and every `fi_interval` steps after it; an interval of 1
    never reuses it. `keep` is the branch that runs on: `auto` is the unconditional one, as published (the conditional
    one where the condition is an image), or the branch called first where each has a call of its own.
    """

    name: ClassVar[str] = "tgate"
    summary: ClassVar[str] = "keep cross-attention from step m - 1 on and drop one guidance branch"

    m: int = Field(10, ge=1)
    sp_interval: int = Field(1, ge=1)
    fi_interval: int = Field(1, ge=1)
    warm_up: int = Field(0, ge=0)
    keep: Keep = "auto"

    @property
    def gate(self) -> int:
        """`m`."""
        return self.m

    @property
    def self_attention(self) -> tuple[int, int, int]:
        """As configured."""
        return (self.sp_interval, self.fi_interval, self.warm_up)

    def stays(self, layout: Layout) -> str:
        """Name the branch that runs on after the gate."""
        return _stays(self.keep, layout)


class Cair(Gated):
    """CAIR, the schedule of TGATE under its other name: the first `n` steps are guided."""

    name: ClassVar[str] = "cair"
    summary: ClassVar[str] = "TGATE's schedule under its other name: n is m"

    n: int = Field(10, ge=1)
    keep: Keep = "auto"

    @property
    def gate(self) -> int:
        """`n`."""
        return self.n

    def stays(self, layout: Layout) -> str:
        """Name the branch that runs on after the gate."""
        return _stays(self.keep, layout)


def _stays(keep: Keep, layout: Layout) -> str:
    if keep != "auto":
        return keep
    if layout.separate:  # nothing can stand in for a branch before another one has run
        return layout.order[0]
    return "cond" if layout.condition == "image" else "uncond"
