"""Skip a span of transformer blocks between full steps, and add what it added last (arXiv 2406.01125)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from cachekit import Action, BranchChange, Kind, Moment, Policy, Region, SiteError, SiteMap, Target

if TYPE_CHECKING:
    from cachekit import Streams

#: Prefixes of the names of the two spans.
_FRONT, _BACK = "front: ", "back: "
#: Share of the chain's blocks that a span has by default.
_SHARE = 0.75


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
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.BLOCK})
    # What was added in guided steps is stale once guidance or attention changes: begin a new phase.
    on_branch_change: ClassVar[BranchChange] = BranchChange.REFRESH

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

    # -- where --------------------------------------------------------------------------------------------

    def select(self, sites: SiteMap) -> Sequence[Target]:
        """Choose one span, or one at the back and one at the front; each has an entry, for the residual."""
        chain = self._chain(sites)
        length = len(sites.chains[chain])
        if self._has_one_span:
            found = [self._span(sites, chain, self.first or 0, length if self.stop is None else self.stop)]
        else:
            count = max(1, round(_SHARE * length)) if self.blocks is None else self.blocks
            back, front = self._span(sites, chain, length - count, length), self._span(sites, chain, 0, count)
            stages = [replace(back, name=_BACK + back.name), replace(front, name=_FRONT + front.name)]
            found = [front] if count == length else stages
        if not found[0].streams:
            raise SiteError(f"{self}: what enters and leaves {found[0].entry!r} is not known; use another policy")
        return found

    def _chain(self, sites: SiteMap) -> int:
        if not sites.chains:
            cure = "deepcache" if sites.regions else "a policy for attention or guidance"
            raise SiteError(f"{self}: looked for a chain of blocks, but {sites.describe()}; use {cure}")
        if self.chain is None:
            return max(range(len(sites.chains)), key=lambda index: len(sites.chains[index]))
        if self.chain >= len(sites.chains):
            last = len(sites.chains) - 1
            raise SiteError(f"{self}: chain={self.chain}, but {sites.model} has chains 0..{last}; use one of them")
        return self.chain

    def _span(self, sites: SiteMap, chain: int, first: int, stop: int) -> Region:
        length = len(sites.chains[chain])
        if not 0 <= first < stop <= length:
            raise SiteError(
                f"{self}: {stop - first} blocks up to block {stop - 1}, but chain {chain} of {sites.model} has blocks"
                f" 0..{length - 1}; give a span within them"
            )
        return sites.span(first, stop, chain)

    # -- when ---------------------------------------------------------------------------------------------

    def action(self, target: Target, at: Moment) -> Action:
        """Keep on full steps; between them reuse the span of the stage and compute the other."""
        if (at.step - at.origin) % self.interval == 0:
            return Action.STORE
        boundary = at.steps // 2 if self.boundary is None else self.boundary
        other = _FRONT if at.step < boundary else _BACK
        return Action.COMPUTE if target.name.startswith(other) else Action.REUSE

    # -- what ---------------------------------------------------------------------------------------------

    def to_keep(self, output: Streams, entry: Streams, before: Any, at: Moment) -> Streams:
        """Keep what the span added to each stream, `(branches * batch, tokens, channels)`."""
        left, entered = ([tuple(stream.shape) for stream in streams] for streams in (output, entry))
        if left != entered:
            raise SiteError(f"{self}: {entered} entered the blocks, but {left} left them; use another policy")
        return tuple(after - into for after, into in zip(output, entry))

    def restore(self, kept: Streams, entry: Streams, at: Moment) -> Streams:
        """Add to each stream, as it enters now, what the span added last."""
        return tuple(into + added for into, added in zip(entry, kept))
