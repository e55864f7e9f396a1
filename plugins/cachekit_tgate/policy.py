"""Keep cross-attention outputs once they have converged, and drop a guidance branch (arXiv 2404.02747)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Union

from pydantic import Field

from cachekit import (
    After,
    BranchChange,
    Choice,
    Drop,
    Guidance,
    Kind,
    Policy,
    Reuse,
    Schedule,
    SiteError,
    SiteMap,
    Sites,
    Target,
    Where,
)  # fmt: skip

from .gate import AroundGate, MeasuredReuse, UntilGate

#: The branch that runs on after the gate.
Keep = Literal["auto", "cond", "uncond"]
#: The number of guided steps, or `auto` where the run finds it.
Step = Union[Annotated[int, Field(ge=1)], Literal["auto"]]
#: The share of the greatest change at which cross-attention counts as converged.
SETTLED = 0.4


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


def gated(m: Step, keep: Keep, mean: bool, settled: float) -> Mapping[str, Choice]:
    """Keep cross-attention at step m - 1 and drop a branch from step m on; equation 6 keeps the branches' mean."""
    when: Schedule = UntilGate(settled=settled) if m == "auto" else After(m=m)
    what = MeasuredReuse() if m == "auto" else Reuse()
    return {
        "cross_attention": Choice(CrossAttention(), when, what, _change(mean)),
        "guidance": Choice(Guidance(keep=keep), when, Drop()),
    }


def _change(mean: bool) -> BranchChange:
    """Choose what is kept where a branch is dropped: the mean of all, or the remaining branch's own part."""
    return BranchChange.MEAN if mean else BranchChange.REMAINING


class Tgate(Policy):
    """TGATE: the first `m` steps are guided, the others reuse their cross-attention and run one branch.

    The cross-attention outputs of step m - 1 serve from step m on. Self-attention is kept at step `warm_up`, then
    recomputed every `sp_interval` steps before the gate and every `fi_interval` steps after it; an interval of 1
    never reuses it. `keep` is the branch that runs on: `auto` is the unconditional one, as published (the conditional
    one where the condition is an image), or the branch called first where each has a call of its own. What is kept is
    the mean of both branches, as published; with `mean=false` the branch that runs on keeps its own.

    With `m=auto` the gate opens once cross-attention has converged: after the first step in which its outputs change by
    at most `settled` of their greatest change so far.
    """

    name: ClassVar[str] = "tgate"
    summary: ClassVar[str] = "keep cross-attention from step m - 1 on and drop one guidance branch"
    paper: ClassVar[str] = "arXiv 2404.02747"

    m: Step = 10
    sp_interval: int = Field(1, ge=1)
    fi_interval: int = Field(1, ge=1)
    warm_up: int = Field(0, ge=0)
    keep: Keep = "auto"
    mean: bool = True
    settled: float = Field(SETTLED, gt=0, le=1)

    def choices(self) -> Mapping[str, Choice]:
        """Choose cross-attention and guidance, and self-attention if an interval reuses it."""
        choices = gated(self.m, self.keep, self.mean, self.settled)
        if (self.sp_interval, self.fi_interval) == (1, 1):
            return choices
        when = AroundGate(
            gate=None if self.m == "auto" else self.m,
            settled=self.settled,
            before=self.sp_interval,
            after=self.fi_interval,
            warm_up=self.warm_up,
        )
        return {**choices, "self_attention": Choice(SelfAttention(), when, Reuse(), _change(self.mean))}


class Cair(Policy):
    """CAIR, the schedule of TGATE under its other name: the first `n` steps are guided."""

    name: ClassVar[str] = "cair"
    summary: ClassVar[str] = "TGATE's schedule under its other name: n is m"
    paper: ClassVar[str] = "arXiv 2404.02747"

    n: Step = 10
    keep: Keep = "auto"
    mean: bool = True

    def choices(self) -> Mapping[str, Choice]:
        """Choose cross-attention and guidance."""
        return gated(self.n, self.keep, self.mean, SETTLED)
