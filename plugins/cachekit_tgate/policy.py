"""Keep cross-attention outputs once they have converged, and drop a guidance branch (arXiv 2404.02747)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from cachekit import (
    Action,
    After,
    BranchChange,
    Choice,
    Drop,
    Guidance,
    Kind,
    Moment,
    Policy,
    Reuse,
    Schedule,
    SiteError,
    SiteMap,
    Sites,
    Target,
    Where,
)  # fmt: skip

#: The branch that runs on after the gate.
Keep = Literal["auto", "cond", "uncond"]


class CrossAttention(Sites):
    """Cross-attention, with a refusal that says what TGATE needs."""

    kinds: tuple[Literal[Kind.CROSS_ATTENTION], ...] = (Kind.CROSS_ATTENTION,)

    def find(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the sites; raises `SiteError` where the text has no attention of its own."""
        if not sites.of(Kind.CROSS_ATTENTION):
            cure = "delta_dit or " if sites.chains else "deepcache or " if sites.regions else ""
            raise SiteError(
                f"looked for cross_attention, but {sites.describe()}; TGATE needs text in an attention of its"
                f" own: use {cure}adaptive_guidance"
            )
        return sites.of(Kind.CROSS_ATTENTION)


class SelfAttention(Where):
    """Self-attention, over frames too, where there is any."""

    name: ClassVar[str] = "self_attention"

    def find(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the sites."""
        return sites.of(Kind.SELF_ATTENTION, Kind.TEMPORAL_ATTENTION)


class AroundGate(Schedule):
    """The second version's schedule at self-attention, around the gate at step `gate`.

    Kept at step `warm_up`, then every `before` steps up to the gate and every `after` steps from it on.
    """

    name: ClassVar[str] = "around_gate"

    gate: int
    before: int
    after: int
    warm_up: int

    def action(self, at: Moment) -> Action:
        """Compute up to the warm-up, then keep every so many steps and reuse between them."""
        if at.step >= self.gate:
            return Action.STORE if at.step % self.after == 0 else Action.REUSE
        if at.step in (self.warm_up, self.gate - 1):
            return Action.STORE
        if at.step < self.warm_up:
            return Action.COMPUTE
        return Action.STORE if at.step % self.before == 0 else Action.REUSE


def gated(m: int, keep: Keep) -> Mapping[str, Choice]:
    """Keep cross-attention at step m - 1 and drop a branch from step m on; equation 6 keeps the branches' mean."""
    return {
        "cross_attention": Choice(CrossAttention(), After(m=m), Reuse(), BranchChange.MEAN),
        "guidance": Choice(Guidance(keep=keep), After(m=m), Drop()),
    }


class Tgate(Policy):
    """TGATE: the first `m` steps are guided, the others reuse their cross-attention and run one branch.

    The cross-attention outputs of step m - 1 serve from step m on. Self-attention is kept at step `warm_up`, then
    recomputed every `sp_interval` steps before the gate and every `fi_interval` steps after it; an interval of 1
    never reuses it. `keep` is the branch that runs on: `auto` is the unconditional one, as published (the conditional
    one where the condition is an image), or the branch called first where each has a call of its own.
    """

    name: ClassVar[str] = "tgate"
    summary: ClassVar[str] = "keep cross-attention from step m - 1 on and drop one guidance branch"
    paper: ClassVar[str] = "arXiv 2404.02747"

    m: int = Field(10, ge=1)
    sp_interval: int = Field(1, ge=1)
    fi_interval: int = Field(1, ge=1)
    warm_up: int = Field(0, ge=0)
    keep: Keep = "auto"

    def choices(self) -> Mapping[str, Choice]:
        """Choose cross-attention and guidance, and self-attention if an interval reuses it."""
        choices = gated(self.m, self.keep)
        if (self.sp_interval, self.fi_interval) == (1, 1):
            return choices
        when = AroundGate(gate=self.m, before=self.sp_interval, after=self.fi_interval, warm_up=self.warm_up)
        return {**choices, "self_attention": Choice(SelfAttention(), when, Reuse(), BranchChange.MEAN)}


class Cair(Policy):
    """CAIR, the schedule of TGATE under its other name: the first `n` steps are guided."""

    name: ClassVar[str] = "cair"
    summary: ClassVar[str] = "TGATE's schedule under its other name: n is m"
    paper: ClassVar[str] = "arXiv 2404.02747"

    n: int = Field(10, ge=1)
    keep: Keep = "auto"

    def choices(self) -> Mapping[str, Choice]:
        """Choose cross-attention and guidance."""
        return gated(self.n, self.keep)
