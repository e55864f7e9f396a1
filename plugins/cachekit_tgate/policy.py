"""Keep cross-attention outputs once they have converged, and drop a guidance branch from then on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cachekit import Action, BranchChange, Kind, Moment, Policy, SiteMap, Target

if TYPE_CHECKING:
    from cachekit import Layout

Keep = Literal["auto", "cond", "uncond"]


class Gated(Policy):
    """Hold TGATE's rule for a gate at step `gate`; subclasses name the config."""

    paper: ClassVar[str] = "arXiv 2404.02747"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.CROSS_ATTENTION, Kind.SELF_ATTENTION, Kind.GUIDANCE})
    # Equation 6 keeps the mean of the conditional and the unconditional output.
    on_branch_change: ClassVar[BranchChange] = BranchChange.MEAN

    @property
    def gate(self) -> int:
        """Return the first step after the gate: the number of guided steps."""
        raise NotImplementedError

    @property
    def self_attention(self) -> tuple[int, int, int]:
        """Return (sp_interval, fi_interval, warm_up): how self-attention is reused."""
        return (1, 1, 0)

    def select(self, sites: SiteMap) -> Sequence[Target]:
        """Return guidance and cross-attention, and self-attention where an interval reuses it."""
        if not sites.of(Kind.CROSS_ATTENTION):
            raise self._refusal(sites)
        reuses = self.self_attention[:2] != (1, 1)
        return [site for site in sites.of(*self.kinds) if site.kind is not Kind.SELF_ATTENTION or reuses]

    def action(self, target: Target, at: Moment) -> Action:
        """Return the action of section 4.2, and of self-attention in the second version."""
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
    """Configure TGATE.

    `m` steps are guided; the cross-attention outputs of step m - 1 serve from step m on, with one branch.
    Self-attention is kept at step `warm_up`, then recomputed every `sp_interval` steps before the gate and every
    `fi_interval` after it; 1 never reuses it. `keep` is the branch that stays: `auto` is the unconditional one
    (the conditional one where the condition is an image), as published, or the first where each has a call of
    its own.
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
        """Return m."""
        return self.m

    @property
    def self_attention(self) -> tuple[int, int, int]:
        """Return the config's (sp_interval, fi_interval, warm_up)."""
        return (self.sp_interval, self.fi_interval, self.warm_up)

    def stays(self, layout: Layout) -> str:
        """Return the branch that stays after the gate."""
        return _stays(self.keep, layout)


class Cair(Gated):
    """Configure CAIR, the same schedule under another name: `n` guided steps are TGATE's m."""

    name: ClassVar[str] = "cair"
    summary: ClassVar[str] = "TGATE's schedule under its other name: n is m"

    n: int = Field(10, ge=1)
    keep: Keep = "auto"

    @property
    def gate(self) -> int:
        """Return n."""
        return self.n

    def stays(self, layout: Layout) -> str:
        """Return the branch that stays after the gate."""
        return _stays(self.keep, layout)


def _stays(keep: Keep, layout: Layout) -> str:
    if keep != "auto":
        return keep
    if layout.separate:  # the other branches can only wait for the one that is called first
        return layout.order[0]
    return "cond" if layout.condition == "image" else "uncond"
