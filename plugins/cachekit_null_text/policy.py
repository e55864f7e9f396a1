"""Replace the caption by the empty prompt on some steps, to measure when text matters (arXiv 2404.02747)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from cachekit import Action, Kind, Moment, Policy, Target

if TYPE_CHECKING:
    from cachekit import Layout


class NullText(Policy):
    """Null text: steps from `after` on, or before `before`, get the empty prompt instead of the caption.

    `after=m` is the paper's S^F, `before=m` its S^L (section 3). With the empty prompt in both branches guidance is
    u + g (u - u) = u, so those steps run the unconditional branch alone.
    """

    name: ClassVar[str] = "null_text"
    summary: ClassVar[str] = "feed the empty prompt from a step on, or up to it"
    paper: ClassVar[str] = "arXiv 2404.02747"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.GUIDANCE})

    after: int | None = Field(None, ge=0)
    before: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _some_steps(self) -> Self:
        if self.after is None and self.before is None:
            raise ValueError("give after=m, before=m or both")
        return self

    def action(self, target: Target, at: Moment) -> Action:
        """Drop the conditional branch on the steps without text."""
        late = self.after is not None and at.step >= self.after
        early = self.before is not None and at.step < self.before
        return Action.REUSE if late or early else Action.COMPUTE

    def stays(self, layout: Layout) -> str:
        """Name the branch without text."""
        return "uncond"
