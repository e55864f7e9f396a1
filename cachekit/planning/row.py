"""One step of a plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cachekit.interface.moment import OPEN, Action, Open
from cachekit.interface.sites import Branches

#: An entry of a plan's table: an action, or `OPEN` where only the run can decide.
Cell = Action | Open


@dataclass
class Row:
    """One step of a plan: the branches that run, and a cell for each assignment.

    `narrowed_by` is the index of the guidance assignment that dropped a branch, or None where all of them run.
    `origins` has, for each assignment, the step at which its schedule last started anew. `last_branches` has the
    branches that read each STORE, where they are fewer than have made it: it can be narrowed at once, which saves
    memory.
    """

    step: int
    branches: Branches
    actions: list[Cell]
    narrowed_by: int | None = None
    origins: list[int] = field(default_factory=list)
    last_branches: dict[int, Branches] = field(default_factory=dict)

    @property
    def signature(self) -> tuple[object, ...]:
        """What the cost of a step depends on: two steps with equal signatures cost the same."""
        return (self.branches, tuple(self.actions), tuple(sorted(self.last_branches.items())))

    @property
    def decided(self) -> Row:
        """The row at its most expensive: every open cell is a STORE."""
        return replace(self, actions=[Action.STORE if cell is OPEN else cell for cell in self.actions])
