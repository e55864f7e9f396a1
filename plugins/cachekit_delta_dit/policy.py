"""Skip a span of transformer blocks between full steps, and add what it added last (arXiv 2406.01125)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from cachekit import (
    Action,
    BranchChange,
    Choice,
    Every,
    Moment,
    Open,
    Policy,
    Reuse,
    SiteMap,
    Span,
    Target,
    Where,
)  # fmt: skip

#: Share of the chain's blocks that a span has by default.
_SHARE = 0.75


class Share(Span):
    """The first or the last `blocks` blocks of a chain, three quarters of it by default."""

    name: ClassVar[str] = "share"

    side: Literal["front", "back"]
    blocks: int | None = None

    def find(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the span; the whole chain is one span, used in both halves of the run."""
        chain = self.chain_of(sites)
        length = len(sites.chains[chain])
        count = max(1, round(_SHARE * length)) if self.blocks is None else self.blocks
        if count == length:
            return [sites.span(0, length, chain)] if self.side == "back" else []
        first = 0 if self.side == "front" else length - count
        region = sites.span(first, first + count, chain)
        return [replace(region, name=f"{self.side}: {region.name}")]


class Staged(Every):
    """A full step every `n` steps; between them reuse in one half of the run, and compute in the other.

    The halves meet at step `boundary`, by default the middle of the run.
    """

    name: ClassVar[str] = "staged"

    boundary: int | None = None
    half: Literal["early", "late"] | None = None

    def action(self, at: Moment) -> Action | Open:
        """Keep on full steps; between them reuse in this half alone."""
        boundary = at.steps // 2 if self.boundary is None else self.boundary
        is_half = self.half is not None and at.target is not None and at.target.name.startswith(("front: ", "back: "))
        in_use = not is_half or (at.step < boundary) == (self.half == "early")
        return Action.STORE if self.full(at) else Action.REUSE if in_use else Action.COMPUTE


class DeltaDiT(Policy):
    """Delta-DiT: a span of transformer blocks runs on full steps alone, and its residual is added on the others.

    A full step keeps what the span adds to each stream that runs through it, exit minus entry
    `(branches * batch, tokens, channels)`. There is a full step every `interval` steps. Before step `boundary`
    (none: half of the run) the span is the last `blocks` blocks of the chain, from it on the first `blocks` (none:
    three quarters of the chain). With `first` or `stop` it is blocks `first` to `stop - 1` in all steps. `chain`
    counts the model's chains of blocks from 0 (none: the longest).
    """

    name: ClassVar[str] = "delta_dit"
    summary: ClassVar[str] = "skip a run of transformer blocks between full steps and add what it added last"
    paper: ClassVar[str] = "arXiv 2406.01125"

    interval: int = Field(2, ge=1)
    boundary: int | None = Field(None, ge=0)
    blocks: int | None = Field(None, ge=1)
    first: int | None = Field(None, ge=0)
    stop: int | None = Field(None, ge=1)
    chain: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self._has_one_span and not (self.boundary is None and self.blocks is None):
            raise ValueError("first and stop exclude blocks and boundary; give one span or a stage-adaptive one")
        return self

    @property
    def _has_one_span(self) -> bool:
        return self.first is not None or self.stop is not None

    def choices(self) -> Mapping[str, Choice]:
        """Choose one span for all steps, or one at the back and one at the front; both keep what they add."""
        if self._has_one_span:
            return {"span": self._choice(Span(first=self.first or 0, stop=self.stop, chain=self.chain), None)}
        return {
            "back": self._choice(Share(side="back", blocks=self.blocks, chain=self.chain), "early"),
            "front": self._choice(Share(side="front", blocks=self.blocks, chain=self.chain), "late"),
        }

    def _choice(self, where: Where, half: Literal["early", "late"] | None) -> Choice:
        when = Staged(n=self.interval, boundary=self.boundary, half=half)
        # What was added in guided steps is stale once guidance or attention changes: begin a new phase.
        return Choice(where, when, Reuse(of="residual"), BranchChange.REFRESH)
