"""Compose the rows of a plan, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cachekit.interface.adapter import Layout
from cachekit.interface.policy import Action, BranchChange, Moment
from cachekit.interface.sites import Branches, Kind
from cachekit.planning.assignments import Assignment
from cachekit.planning.row import Row

#: Asked for the cells that a rule leaves open; returns None where a probe decides inside the call.
Decide = Callable[["Assignment", Moment], "Action | None"]


class Composer:
    """Compose rows step by step; the same code makes the printed plan and drives the run.

    Rank is guidance, then blocks, then the sites inside. A step on which a policy must STORE a site is a step on
    which no block or region around it is reused. A change of branches restarts the schedules that ask for it.
    """

    def __init__(
        self, assignments: Sequence[Assignment], steps: int, layout: Layout, dropped: frozenset[int] = frozenset()
    ) -> None:
        """Start before step 0 of `steps`; `layout` says how the branches come, `dropped` assignments only compute."""
        self.assignments = assignments
        self.steps = steps
        self.layout = layout
        self.dropped = dropped
        self.branches: Branches = layout.order
        self.narrowed_by: int | None = None
        self._origin = [0] * len(assignments)
        self._schedules: dict[tuple[int, int], list[Action | None]] = {}
        self._blocks = [i for i, a in enumerate(assignments) if a.target.kind is Kind.BLOCK]
        self._guidance = [i for i, a in enumerate(assignments) if a.target.kind is Kind.GUIDANCE]
        self._inside = {i: self._covered(i) for i in self._blocks}

    def row(self, step: int, decide: Decide) -> Row:
        """Return the row of `step`; steps are asked for in order, each once."""
        if step >= self.steps:
            self._lengthen(max(step + 1, 2 * self.steps))
        cells = [self._cell(index, step, decide) for index in range(len(self.assignments))]
        before = self.branches
        self._narrow(cells)
        if self.branches != before:
            for index in self._restart(step):
                cells[index] = self._cell(index, step, decide)
        self._force_full(cells, step, decide)
        return Row(step, self.branches, cells, self.narrowed_by, list(self._origin))

    def _cell(self, index: int, step: int, decide: Decide) -> Action | None:
        if index in self.dropped:
            return Action.COMPUTE
        origin = self._origin[index]
        action = self._schedule(index, origin)[step - origin]
        if action is None:
            return decide(self.assignments[index], Moment(step, self.steps, origin))
        return action

    def _schedule(self, index: int, origin: int) -> list[Action | None]:
        if (index, origin) not in self._schedules:
            bound = self.assignments[index]
            moments = (Moment(step, self.steps, origin) for step in range(origin, self.steps))
            actions = [bound.policy.action(bound.target, at) for at in moments]
            every_store_counts = bound.target.kind is Kind.GUIDANCE or bound.policy.keeps_history
            self._schedules[index, origin] = actions if every_store_counts else _without_idle_stores(actions)
        return self._schedules[index, origin]

    def _narrow(self, cells: list[Action | None]) -> None:
        guided = len(self.layout.order) > 1
        votes = [i for i in self._guidance if cells[i] is Action.REUSE] if guided else []
        if self.narrowed_by not in votes:
            self.narrowed_by = min(votes, key=lambda i: self.assignments[i].policy.name, default=None)
        for index in self._guidance:
            if cells[index] is None and guided:
                continue
            stored = self.narrowed_by is None and cells[index] is Action.STORE and guided
            cells[index] = Action.STORE if stored else Action.COMPUTE
        if self.narrowed_by is not None:
            cells[self.narrowed_by] = Action.REUSE
            self.branches = (self.assignments[self.narrowed_by].policy.stays(self.layout),)
        else:
            self.branches = self.layout.order

    def _restart(self, step: int) -> list[int]:
        if step == 0:
            return []
        refreshed = [
            i
            for i, bound in enumerate(self.assignments)
            if bound.policy.on_branch_change is BranchChange.REFRESH and bound.target.kind is not Kind.GUIDANCE
        ]
        for index in refreshed:
            self._origin[index] = step
        return refreshed

    def _force_full(self, cells: list[Action | None], step: int, decide: Decide) -> None:
        """Let blocks run around a STORE; all blocks of such a policy begin anew, or they would get out of step."""
        forced = [index for index in self._blocks if self._must_run(index, cells)]
        policies = [self.assignments[index].policy for index in forced]
        for index in self._blocks:
            if self.assignments[index].policy in policies:
                self._origin[index] = step
                cells[index] = Action.STORE if index in forced else self._cell(index, step, decide)

    def _must_run(self, index: int, cells: list[Action | None]) -> bool:
        skipped = cells[index] in (Action.REUSE, None)
        return skipped and any(cells[inner] is Action.STORE for inner in self._inside[index])

    def _covered(self, index: int) -> list[int]:
        block = self.assignments[index]
        return [
            i
            for i, bound in enumerate(self.assignments)
            if bound.denoiser == block.denoiser
            and bound.target.kind is not Kind.BLOCK
            and block.target.covers(bound.target.name)
        ]

    def _lengthen(self, steps: int) -> None:
        self.steps = steps
        self._schedules.clear()


def _without_idle_stores(actions: list[Action | None]) -> list[Action | None]:
    """Replace each STORE that no later REUSE reads by COMPUTE: it would cost memory for nothing."""
    wanted = False
    cleaned: list[Action | None] = []
    for action in reversed(actions):
        cleaned.append(Action.COMPUTE if action is Action.STORE and not wanted else action)
        if action is Action.STORE:
            wanted = False
        elif action is not Action.COMPUTE:
            wanted = True
    return cleaned[::-1]
