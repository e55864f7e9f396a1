"""Compose the rows of a plan, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from cachekit.errors import PolicyError, answered
from cachekit.interface.adapter import Layout
from cachekit.interface.indicators import Indicator
from cachekit.interface.moment import OPEN, Action, Moment, Time
from cachekit.interface.parts import BranchChange
from cachekit.interface.sites import Branches, Kind, Target
from cachekit.planning.assignments import Assignment, origin
from cachekit.planning.row import Cell, Row

#: Decides a cell that its schedule leaves open, by index of the assignment; `OPEN` leaves it to a probe.
Decide = Callable[[int, Moment], Cell]


def undecided(index: int, at: Moment) -> Cell:
    """Leave every open cell open, as plans do."""
    return OPEN


class Composer:
    """Composes rows, for the printed plan and for a run that decides as it goes.

    Guidance is settled first, then the denoiser and blocks, then the sites inside. A STORE of a schedule that insists
    makes everything around its target run in that step; any other STORE inside something that is reused is postponed
    to the next step in which it is not. Where a branch is dropped for good, or comes back without anything kept of it,
    the schedules of those choices restart that ask for it (`BranchChange.REFRESH`).

    `branches` are those that run in the last composed step. `narrowed_by` is the guidance assignment that dropped a
    branch: its choice of the branch holds until a step on which it drops none.
    """

    def __init__(
        self,
        assignments: Sequence[Assignment],
        steps: int,
        layout: Layout,
        dropped: frozenset[int] = frozenset(),
        times: Sequence[Time] = (),
    ) -> None:
        """Start before step 0 of `steps`; `dropped` assignments compute in every step, `times` are of the scheduler."""
        self.assignments = assignments
        self.steps = steps
        self.layout = layout
        self.dropped = dropped
        self.times = times
        self.branches: Branches = layout.order
        self.narrowed_by: int | None = None
        self._origin = [0] * len(assignments)
        #: The cells of each assignment from its origin on, as its schedule alone decides; None until they are needed.
        self._columns: list[list[Cell] | None] = [None] * len(assignments)
        #: Those of schedules that decide alike for all targets, or for all of a kind: by choice, origin, and the kind.
        self._alike: dict[tuple[int, int, Kind | None], list[Cell]] = {}
        self._blocks = [index for index, bound in enumerate(assignments) if bound.is_block]
        self._guidance = [index for index, bound in enumerate(assignments) if bound.is_guidance]
        #: Decided again where the branches change, by the sample and the memory of those that run.
        self._by_sample = [
            index for index in self._blocks if assignments[index].is_whole and _is_indicator(assignments[index])
        ]
        self._inside = {index: self._inside_of(index) for index in self._blocks}
        #: STOREs that have been postponed, and the branches of which each assignment has stored something.
        self._owed: set[int] = set()
        self._stored: list[set[str]] = [set() for _ in assignments]

    def row(self, step: int, decide: Decide) -> Row:
        """Compose the row of `step`; each step is asked for once, in order. A run may go beyond `steps`."""
        if step >= self.steps:
            self._lengthen(max(step + 1, 2 * self.steps))
        cells = [self._cell(index, step, decide) for index in range(len(self.assignments))]
        before = self.branches
        self._settle_guidance(cells)
        if self.branches != before:
            stale = self._stale(step, before) if step else []
            for index in stale:
                self._restart(index, step)
            for index in {*stale, *self._by_sample}:
                cells[index] = self._cell(index, step, decide)
        self._force_full(cells, step, decide)
        self._postpone(cells, step)
        for index, cell in enumerate(cells):
            if cell is Action.STORE:
                self._stored[index].update(self.branches)
        return Row(step, self.branches, cells, self.narrowed_by, list(self._origin))

    def restart(self, denoiser: str, step: int) -> None:
        """Restart the schedules of a denoiser that makes its first call in this step."""
        for index, bound in enumerate(self.assignments):
            if not bound.is_guidance and bound.denoiser == denoiser:
                self._restart(index, step)

    # -- cells --------------------------------------------------------------------------------------------

    def _cell(self, index: int, step: int, decide: Decide) -> Cell:
        if index in self.dropped:
            return Action.COMPUTE
        origin = self._origin[index]
        cell = (self._columns[index] or self._column(index))[step - origin]
        return decide(index, self._moment(index, step, origin)) if cell is OPEN else cell

    def _moment(self, index: int, step: int, origin: int) -> Moment:
        return Moment(step, self.steps, origin, time_of(self.times, step), self.assignments[index].target)

    def _column(self, index: int) -> list[Cell]:
        """List the cells of an assignment from its origin to the last step, as its schedule alone decides."""
        found = self._columns[index]
        if found is None:
            found = self._columns[index] = self._scheduled(self.assignments[index], self._origin[index])
        return found

    def _scheduled(self, bound: Assignment, origin: int) -> list[Cell]:
        """Ask a schedule for its cells, once for all targets that are the same to what it looks at."""
        choice, kind, looks = id(bound.choice), bound.target.kind, set[str]()
        for key in ((choice, origin, None), (choice, origin, kind)):
            if key in self._alike:
                return self._alike[key]
        moments = (
            Watched.of(looks, step, self.steps, origin, time_of(self.times, step), bound.target)
            for step in range(origin, self.steps)
        )
        cells = without_idle_stores([scheduled(bound, at) for at in moments], bound)
        if "target" not in looks:
            self._alike[choice, origin, kind if "kind" in looks else None] = cells
        return cells

    def _restart(self, index: int, step: int) -> None:
        self._origin[index] = step
        self._columns[index] = None
        self._stored[index].clear()
        self._owed.discard(index)

    def _lengthen(self, steps: int) -> None:
        self.steps = steps
        self._columns = [None] * len(self.assignments)
        self._alike.clear()

    # -- guidance -----------------------------------------------------------------------------------------

    def _settle_guidance(self, cells: list[Cell]) -> None:
        """Choose the assignment that drops a branch, if any does, and set all guidance cells accordingly."""
        for index in self._guidance:
            if index in self._owed and cells[index] is Action.REUSE and not self._is_skipped(index, cells):
                cells[index] = Action.STORE
        votes = [index for index in self._guidance if self._is_guided and cells[index] is Action.REUSE]
        if self.narrowed_by not in votes:
            self.narrowed_by = min(votes, key=lambda index: self.assignments[index].policy.name, default=None)
        self.branches = self.layout.order
        if self.narrowed_by is not None:
            self.branches = (self.assignments[self.narrowed_by].stays(self.layout),)
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

    def _stale(self, step: int, before: Branches) -> list[int]:
        """List the assignments that a change of branches in this step makes stale."""
        is_dropped = len(self.branches) < len(before) and self._is_for_good(step)
        return [
            index
            for index, bound in enumerate(self.assignments)
            if bound.choice.change is BranchChange.REFRESH
            and not bound.is_guidance
            and (is_dropped or not self._stored[index].issuperset(self.branches))
        ]

    def _is_for_good(self, step: int) -> bool:
        """Whether a dropped branch never comes back, as far as the schedule shows before the run."""
        index = self.narrowed_by
        if index is None:  # the pipeline has ended its guidance
            return True
        origin = self._origin[index]
        return all(cell in (Action.REUSE, OPEN) for cell in self._column(index)[step - origin :])

    # -- blocks and what is inside ------------------------------------------------------------------------

    def _force_full(self, cells: list[Cell], step: int, decide: Decide) -> None:
        """Force blocks around a STORE that insists. All blocks of such a policy restart, to stay in phase."""
        forced = [index for index in self._blocks if self._must_run(index, cells)]
        policies = [self.assignments[index].policy for index in forced]
        for index in self._blocks:
            if self.assignments[index].policy in policies:
                self._restart(index, step)
                cells[index] = Action.STORE if index in forced else self._cell(index, step, decide)

    def _must_run(self, index: int, cells: list[Cell]) -> bool:
        may_be_skipped = cells[index] in (Action.REUSE, OPEN)
        return may_be_skipped and any(
            cells[inner] is Action.STORE and self.assignments[inner].choice.when.insists
            for inner in self._inside[index]
        )

    def _postpone(self, cells: list[Cell], step: int) -> None:
        """Postpone each STORE inside a reused target; perform the postponed ones that are now outside."""
        for index, cell in enumerate(cells):
            if cell is not Action.STORE and index not in self._owed:
                continue
            if self._is_skipped(index, cells):
                self._owed.add(index)
                cells[index] = Action.COMPUTE if cell is Action.STORE else cell
            else:
                self._owed.discard(index)
                is_due = cell is Action.REUSE or (cell is Action.COMPUTE and self._is_read_next(index, step))
                cells[index] = Action.STORE if is_due and index not in self._guidance else cell

    def _is_read_next(self, index: int, step: int) -> bool:
        """Whether a schedule reads what is kept before it keeps anew."""
        later = self._column(index)[step - self._origin[index] + 1 :]
        return next((cell for cell in later if cell is not Action.COMPUTE), Action.STORE) is not Action.STORE

    def _is_skipped(self, index: int, cells: list[Cell]) -> bool:
        return any(cells[block] is Action.REUSE and index in self._inside[block] for block in self._blocks)

    def _inside_of(self, index: int) -> frozenset[int]:
        """List what doesn't run where a block is reused; guidance keeps nothing of a call that is left out."""
        block = self.assignments[index]
        return frozenset(
            inner
            for inner, bound in enumerate(self.assignments)
            if inner != index and (block.covers(bound) or (block.is_whole and bound.is_guidance))
        )


class Watched(Moment):
    """A moment that notes in `looks` whether its target is looked at, or the target's kind alone."""

    looks: set[str]

    @classmethod
    def of(cls, looks: set[str], *values: Any) -> Watched:
        """Make a moment of these values."""
        made = cls(*values)
        made.looks = looks
        return made

    def _replace(self, **changes: Any) -> Watched:
        return self.of(self.looks, *super()._replace(**changes))

    @property
    def target(self) -> Target | None:
        """The target, after it was noted that it matters."""
        self.looks.add("target")
        return super().target

    @property
    def kind(self) -> Kind | None:
        """The kind of the target, after it was noted that it matters."""
        self.looks.add("kind")
        target = super().target
        return target.kind if target is not None else None


def _is_indicator(bound: Assignment) -> bool:
    return isinstance(bound.choice.when, Indicator)


def time_of(times: Sequence[Time], step: int) -> Time:
    """Get a step's place in a scheduler's table, or only its index beyond the table."""
    return times[step] if step < len(times) else Time(step)


def without_idle_stores(cells: list[Cell], bound: Assignment) -> list[Cell]:
    """Replace each STORE that no later REUSE reads by COMPUTE: it would only cost memory."""
    if bound.choice.what.amends or bound.choice.what.watches:
        return cells
    needed: float = 0
    cleaned: list[Cell] = []
    for cell in reversed(cells):
        cleaned.append(Action.COMPUTE if cell is Action.STORE and not needed else cell)
        needed = still_needed(needed, cell, bound)
    return cleaned[::-1]


def still_needed(needed: float, cell: Cell, bound: Assignment) -> float:
    """Update, one step backwards, how many earlier entries are still needed."""
    if cell is Action.STORE and not (bound.choice.what.amends or bound.choice.what.watches):
        return max(needed - 1, 0)
    if cell is Action.COMPUTE:
        return needed
    entries = bound.choice.what.entries
    return math.inf if entries is None else entries


def scheduled(bound: Assignment, at: Moment) -> Cell:
    """Ask a schedule for an action, and check the answer."""
    action = answered(lambda: origin(bound, "action", at), bound.choice.when.action, at)
    if action is not OPEN and not isinstance(action, Action):
        raise PolicyError(f"{origin(bound, 'action', at)} returned {action!r}; return an Action, or OPEN")
    return action
