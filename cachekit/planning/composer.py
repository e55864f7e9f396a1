"""Compose the rows of a plan, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cachekit.interface.adapter import Layout
from cachekit.interface.policy import OPEN, Action, BranchChange, Moment
from cachekit.interface.sites import Branches
from cachekit.planning.assignments import Assignment
from cachekit.planning.row import Cell, Row

#: Decides a cell that its policy's schedule leaves open; the answer `OPEN` leaves it to a probe within the call.
Decide = Callable[[Assignment, Moment], Cell]


class Composer:
    """Composes rows, for the printed plan and for a run that decides as it goes.

    Guidance is settled first, then blocks and regions, then the sites inside. A step on which a policy must STORE a
    site is one on which no block or region around it is reused. A change of branches restarts the schedules of those
    policies that ask for it (`BranchChange.REFRESH`).

    `branches` are those that run in the last composed step. `narrowed_by` is the guidance assignment that dropped a
    branch: its choice of the branch holds until a step on which it drops none.
    """

    def __init__(
        self, assignments: Sequence[Assignment], steps: int, layout: Layout, dropped: frozenset[int] = frozenset()
    ) -> None:
        """Start before step 0 of `steps`; `dropped` assignments compute in every step."""
        self.assignments = assignments
        self.steps = steps
        self.layout = layout
        self.dropped = dropped
        self.branches: Branches = layout.order
        self.narrowed_by: int | None = None
        self._origin = [0] * len(assignments)
        self._schedules: dict[tuple[int, int], list[Cell]] = {}
        self._blocks = [index for index, bound in enumerate(assignments) if bound.is_block]
        self._guidance = [index for index, bound in enumerate(assignments) if bound.is_guidance]
        self._inside = {index: self._sites_inside(index) for index in self._blocks}

    def row(self, step: int, decide: Decide) -> Row:
        """Compose the row of `step`; each step is asked for once, in order. A run may go beyond `steps`."""
        if step >= self.steps:
            self._lengthen(max(step + 1, 2 * self.steps))
        cells = [self._cell(index, step, decide) for index in range(len(self.assignments))]
        before = self.branches
        self._settle_guidance(cells)
        if self.branches != before:
            for index in self._restart(step):
                cells[index] = self._cell(index, step, decide)
        self._force_full(cells, step, decide)
        return Row(step, self.branches, cells, self.narrowed_by, list(self._origin))

    def _cell(self, index: int, step: int, decide: Decide) -> Cell:
        if index in self.dropped:
            return Action.COMPUTE
        origin = self._origin[index]
        cell = self._schedule(index, origin)[step - origin]
        if cell is OPEN:
            return decide(self.assignments[index], Moment(step, self.steps, origin))
        return cell

    def _schedule(self, index: int, origin: int) -> list[Cell]:
        """List the cells of an assignment from the step `origin` to the last one, as its policy alone decides."""
        if (index, origin) not in self._schedules:
            bound = self.assignments[index]
            moments = (Moment(step, self.steps, origin) for step in range(origin, self.steps))
            cells = [bound.policy.action(bound.target, at) for at in moments]
            every_store_counts = bound.is_guidance or bound.policy.keeps_history
            self._schedules[index, origin] = cells if every_store_counts else _without_idle_stores(cells)
        return self._schedules[index, origin]

    def _settle_guidance(self, cells: list[Cell]) -> None:
        """Choose the assignment that drops a branch, if any does, and set all guidance cells accordingly."""
        votes = [index for index in self._guidance if self._is_guided and cells[index] is Action.REUSE]
        if self.narrowed_by not in votes:
            self.narrowed_by = min(votes, key=lambda index: self.assignments[index].policy.name, default=None)
        self.branches = self.layout.order
        if self.narrowed_by is not None:
            self.branches = (self.assignments[self.narrowed_by].policy.stays(self.layout),)
        for index in self._guidance:
            cells[index] = self._guidance_cell(index, cells[index])

    @property
    def _is_guided(self) -> bool:
        return len(self.layout.order) > 1

    def _guidance_cell(self, index: int, wanted: Cell) -> Cell:
        if index == self.narrowed_by:
            return Action.REUSE
        can_keep = wanted is Action.STORE and self.narrowed_by is None
        return wanted if self._is_guided and (wanted is OPEN or can_keep) else Action.COMPUTE

    def _restart(self, step: int) -> list[int]:
        """Restart the schedules that a change of branches makes stale; list their assignments."""
        if step == 0:
            return []
        refreshed = [
            index
            for index, bound in enumerate(self.assignments)
            if bound.policy.on_branch_change is BranchChange.REFRESH and not bound.is_guidance
        ]
        for index in refreshed:
            self._origin[index] = step
        return refreshed

    def _force_full(self, cells: list[Cell], step: int, decide: Decide) -> None:
        """Force blocks around a STORE to run. All blocks of such a policy restart, to stay in phase with each other."""
        forced = [index for index in self._blocks if self._must_run(index, cells)]
        policies = [self.assignments[index].policy for index in forced]
        for index in self._blocks:
            if self.assignments[index].policy in policies:
                self._origin[index] = step
                cells[index] = Action.STORE if index in forced else self._cell(index, step, decide)

    def _must_run(self, index: int, cells: list[Cell]) -> bool:
        may_be_skipped = cells[index] in (Action.REUSE, OPEN)
        return may_be_skipped and any(cells[inner] is Action.STORE for inner in self._inside[index])

    def _sites_inside(self, index: int) -> list[int]:
        block = self.assignments[index]
        return [i for i, bound in enumerate(self.assignments) if not bound.is_block and block.covers(bound)]

    def _lengthen(self, steps: int) -> None:
        self.steps = steps
        self._schedules.clear()


def _without_idle_stores(cells: list[Cell]) -> list[Cell]:
    """Replace each STORE that no later REUSE reads by COMPUTE: it would only cost memory."""
    is_wanted = False
    cleaned: list[Cell] = []
    for cell in reversed(cells):
        cleaned.append(Action.COMPUTE if cell is Action.STORE and not is_wanted else cell)
        if cell is Action.STORE:
            is_wanted = False
        elif cell is not Action.COMPUTE:
            is_wanted = True
    return cleaned[::-1]
