"""The plan of a run: a table of steps, targets and actions."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from cachekit.interface.adapter import Layout
from cachekit.interface.policy import OPEN, Action
from cachekit.interface.sites import Branches
from cachekit.planning.assignments import Assignment
from cachekit.planning.composer import Composer
from cachekit.planning.drawing import Column, draw
from cachekit.planning.row import Cell, Row

_MARKS = {Action.COMPUTE: ".", Action.STORE: "S", Action.REUSE: "r", OPEN: "?"}
_LEGEND = ". compute  S compute and keep  r reuse  ? decided during the run"


@dataclass(frozen=True)
class Plan:
    """The table of a run: a row for each step, a cell in it for each assignment.

    `attachment.plan(steps)` makes one. `str(plan)` prints it, `plan.picture()` draws it. `dropped` are the indices of
    assignments that compute in every step, because what they would keep doesn't fit into `max_cache_bytes`.

    >>> from cachekit import Kind, Policy, Site
    >>> from cachekit.planning.assignments import assign
    >>> class Late(Policy):
    ...     name, kinds = "late", frozenset(Kind)
    ...     start: int = 3
    ...     def action(self, target, at):
    ...         if at.step < self.start:
    ...             return Action.STORE if target.kind is Kind.SELF_ATTENTION else Action.COMPUTE
    ...         return Action.REUSE
    >>> targets = [Site("guidance", Kind.GUIDANCE), Site("attn1", Kind.SELF_ATTENTION)]
    >>> print(make_plan(assign([(Late(start=4), "", targets)]), 11, Layout()))
    step                              0         1
                                      01234567890
    branches                          22221111111
    late:start=4  guidance x 1        ....rrrrrrr
    late:start=4  self_attention x 1  ...Srrrrrrr
    . compute  S compute and keep  r reuse  ? decided during the run
    """

    assignments: tuple[Assignment, ...]
    rows: tuple[Row, ...]
    dropped: frozenset[int] = frozenset()

    def covers(self, outer: int, inner: int) -> bool:
        """Whether the target of assignment `inner` lies inside that of `outer`, another one: see `Assignment`."""
        return outer != inner and self.assignments[outer].covers(self.assignments[inner])

    @property
    def is_static(self) -> bool:
        """Whether every action is known before the run: no cell is open."""
        return all(OPEN not in row.actions for row in self.rows)

    @functools.cached_property
    def unread(self) -> tuple[frozenset[int], ...]:
        """For each step, the assignments whose kept tensors are no longer read from that step on, but were before.

        All sets are empty where the plan is not static.
        """
        found: list[frozenset[int]] = [frozenset() for _ in self.rows]
        if not self.is_static:
            return tuple(found)
        for index, bound in enumerate(self.assignments):
            if bound.is_guidance:
                continue
            reads = {Action.REUSE, Action.STORE} if bound.policy.keeps_history else {Action.REUSE}
            for step in _ends([row.actions[index] for row in self.rows], reads):
                found[step] |= {index}
        return tuple(found)

    def columns(self) -> list[Column]:
        """List (spec, name of the target, kind, a mark for each step) for each assignment."""
        return [
            (
                str(bound.policy),
                bound.target.name,
                str(bound.target.kind),
                "".join(_MARKS[row.actions[index]] for row in self.rows),
            )
            for index, bound in enumerate(self.assignments)
        ]

    def picture(self) -> str:
        """Draw the table as SVG: a line for each target, a square for each step."""
        return draw([len(row.branches) for row in self.rows], self.columns())

    def __str__(self) -> str:
        """Print the table: a line for each distinct column, with a mark for each step."""
        steps = range(len(self.rows))
        lines = [
            ("step", "".join(str(step // 10 % 10) if step % 10 == 0 else " " for step in steps)),
            ("", "".join(str(step % 10) for step in steps)),
            ("branches", "".join(str(len(row.branches)) for row in self.rows)),
        ]
        counts = Counter((spec, kind, marks) for spec, _, kind, marks in self.columns())
        lines += [(f"{spec}  {kind} x {count}", marks) for (spec, kind, marks), count in counts.items()]
        width = max(len(label) for label, _ in lines)
        return "\n".join([*(f"{label:{width}}  {marks}" for label, marks in lines), _LEGEND])


def make_plan(
    assignments: tuple[Assignment, ...], steps: int, layout: Layout, dropped: frozenset[int] = frozenset()
) -> Plan:
    """Plan a run of `steps` steps, in which `dropped` assignments only compute.

    Cells that only the run can decide stay open.
    """
    composer = Composer(assignments, steps, layout, dropped)
    rows = tuple(composer.row(step, lambda bound, at: OPEN) for step in range(steps))
    plan = Plan(assignments, rows, dropped)
    # Where branches come one by one, what is kept of the first waits for the second.
    if plan.is_static and not layout.separate:
        _mark_narrowing_stores(rows)
    return plan


def _mark_narrowing_stores(rows: Sequence[Row]) -> None:
    """Set `Row.last_branches`: the branches that next read each STORE, where they are fewer than those that make it."""
    later: dict[int, Branches] = {}
    for row in reversed(rows):
        for index, action in enumerate(row.actions):
            if action is Action.STORE and len(later.get(index, row.branches)) < len(row.branches):
                row.last_branches[index] = later[index]
            if action in (Action.STORE, Action.REUSE):
                later[index] = row.branches


def _ends(cells: Sequence[Cell], reads: Set[Action]) -> Iterator[int]:
    """Yield each step that follows the last read of something kept: it is replaced next, or never read again."""
    is_wanted = False
    for step in range(len(cells) - 1, -1, -1):
        was_wanted, cell = is_wanted, cells[step]
        is_wanted = cell in reads or (is_wanted and cell is not Action.STORE)
        if is_wanted and not was_wanted and step + 1 < len(cells):
            yield step + 1
