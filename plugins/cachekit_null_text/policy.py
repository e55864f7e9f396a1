"""Replace the caption by the empty prompt on some steps, to measure when text matters (arXiv 2404.02747)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from cachekit import Choice, Drop, Guidance, Moment, Policy, Schedule


class WithText(Schedule):
    """Full in the steps that get the caption."""

    name: ClassVar[str] = "with_text"
    summary: ClassVar[str] = "full before one step and from another on"

    after: int | None = None
    before: int | None = None

    def full(self, at: Moment) -> bool:
        """Whether the step is neither early nor late."""
        is_late = self.after is not None and at.step >= self.after
        return not is_late and (self.before is None or at.step >= self.before)


class NullText(Policy):
    """Null text: steps from `after` on, or before `before`, get the empty prompt instead of the caption.

    `after=m` is the paper's S^F, `before=m` its S^L (section 3). With the empty prompt in both branches guidance is
    u + g (u - u) = u, so those steps run the unconditional branch alone.
    """

    name: ClassVar[str] = "null_text"
    summary: ClassVar[str] = "feed the empty prompt from a step on, or up to it"
    paper: ClassVar[str] = "arXiv 2404.02747"

    after: int | None = Field(None, ge=0)
    before: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _some_steps(self) -> Self:
        if self.after is None and self.before is None:
            raise ValueError("give after=m, before=m or both")
        return self

    def choices(self) -> Mapping[str, Choice]:
        """Choose guidance, with the branch without text alone on those steps."""
        return {"guidance": Choice(Guidance(keep="uncond"), WithText(after=self.after, before=self.before), Drop())}
