"""One step of a plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cachekit.interface.policy import Action
from cachekit.interface.sites import Branches


@dataclass
class Row:
    """Hold one step of a plan: the branches that run and an action per assignment.

    `narrowed_by` is the index of the guidance assignment that dropped a branch, or None; `origins` are the steps at
    which each assignment's schedule last started anew; `last_branches` gives, for a STORE whose next reuse is
    known to come with fewer branches, those branches.
    """

    step: int
    branches: Branches
    actions: list[Action | None]
    narrowed_by: int | None = None
    origins: list[int] = field(default_factory=list)
    last_branches: dict[int, Branches] = field(default_factory=dict)

    @property
    def signature(self) -> tuple[object, ...]:
        """Return what makes two steps cost the same."""
        return (self.branches, tuple(self.actions), tuple(sorted(self.last_branches.items())))

    @property
    def decided(self) -> Row:
        """Return this step as it costs and keeps most: each action that only the run can decide is a STORE."""
        return replace(self, actions=[Action.STORE if action is None else action for action in self.actions])
