"""The plan of a run: a table of steps, targets and actions."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from cachekit.interface.adapter import Layout
from cachekit.interface.policy import Action
from cachekit.interface.sites import Branches, Kind
from cachekit.planning.assignments import Assignment, last_module
from cachekit.planning.composer import Composer
from cachekit.planning.drawing import draw
from cachekit.planning.row import Row

_MARKS = {Action.COMPUTE: ".", Action.STORE: "S", Action.REUSE: "r", None: "?"}


def _ends(actions: Sequence[Action | None], reads: Set[Action]) -> Iterator[int]:
    """Yield each step at which something is kept that was read until there, and is next replaced or never read."""
    is_wanted = False
    for step in range(len(actions) - 1, -1, -1):
        was_wanted, action = is_wanted, actions[step]
        is_wanted = action in reads or (is_wanted and action is not Action.STORE)
        if is_wanted and not was_wanted and step + 1 < len(actions):
            yield step + 1


@dataclass(frozen=True)
class Plan:
    """Hold the table of a run: rows of steps, columns of assignments. `str(plan)` prints it, `picture` draws it."""

    assignments: tuple[Assignment, ...]
    rows: tuple[Row, ...]
    dropped: frozenset[int] = frozenset()

    def covers(self, block: int, index: int) -> bool:
        """Tell whether the target of `index` lies in another one, `block`, and does not run when that is reused."""
        outer, inner = self.assignments[block], self.assignments[index]
        if block == index or Kind.GUIDANCE in (outer.target.kind, inner.target.kind):
            return False
        is_outer = outer.target.kind is Kind.BLOCK and outer.denoiser == inner.denoiser
        return is_outer and outer.target.covers(last_module(inner.target))

    @property
    def is_static(self) -> bool:
        """Tell whether every action is known before the run."""
        return all(None not in row.actions for row in self.rows)

    @functools.cached_property
    def unread(self) -> tuple[frozenset[int], ...]:
        """Return, by step, the assignments whose kept tensors nothing reads from there on, but did before."""
        found: list[frozenset[int]] = [frozenset() for _ in self.rows]
        if not self.is_static:
            return tuple(found)
        for index, bound in enumerate(self.assignments):
            if bound.target.kind is Kind.GUIDANCE:
                continue
            reads = {Action.REUSE, Action.STORE} if bound.policy.keeps_history else {Action.REUSE}
            for step in _ends([row.actions[index] for row in self.rows], reads):
                found[step] |= {index}
        return tuple(found)

    def lines(self) -> list[tuple[str, str, int, list[Action | None]]]:
        """Return (spec, kind, number of targets, actions) per distinct column of the table."""
        groups: dict[tuple[str, str, tuple[Action | None, ...]], int] = defaultdict(int)
        for index, bound in enumerate(self.assignments):
            column = tuple(row.actions[index] for row in self.rows)
            groups[str(bound.policy), str(bound.target.kind), column] += 1
        return [(spec, kind, count, list(column)) for (spec, kind, column), count in groups.items()]

    def columns(self) -> list[tuple[str, str, str, str]]:
        """Return (spec, name of the target, kind, a mark per step) per assignment."""
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
        """Return the table as SVG: a square for each target and step."""
        return draw([len(row.branches) for row in self.rows], self.columns())

    def __str__(self) -> str:
        """Return the table as text: one character per step."""
        lines = self.lines()
        labels = [f"{spec}  {kind} x {count}" for spec, kind, count, _ in lines]
        width = max([len(label) for label in labels] + [len("branches")])
        count = len(self.rows)
        tens = "".join(str(step // 10 % 10) if step % 10 == 0 else " " for step in range(count))
        units = "".join(str(step % 10) for step in range(count))
        table = [f"{'step':{width}}  {tens}", f"{'':{width}}  {units}"]
        table.append(f"{'branches':{width}}  " + "".join(str(len(row.branches)) for row in self.rows))
        for label, (_, _, _, column) in zip(labels, lines):
            table.append(f"{label:{width}}  " + "".join(_MARKS[action] for action in column))
        return "\n".join([*table, ". compute  S compute and keep  r reuse  ? decided during the run"])


def make_plan(
    assignments: tuple[Assignment, ...], steps: int, layout: Layout, dropped: frozenset[int] = frozenset()
) -> Plan:
    """Return the plan of a run of `steps` steps; cells that the run decides stay None, `dropped` ones compute."""
    composer = Composer(assignments, steps, layout, dropped)
    rows = tuple(composer.row(step, lambda bound, at: None) for step in range(steps))
    plan = Plan(assignments, rows, dropped)
    # Where branches come one by one, what is kept of the first waits for the second.
    if plan.is_static and not layout.separate:
        _mark_narrowing_stores(rows)
    return plan


def _mark_narrowing_stores(rows: Sequence[Row]) -> None:
    later: dict[int, Branches] = {}
    for row in reversed(rows):
        for index, action in enumerate(row.actions):
            if action is Action.STORE and len(later.get(index, row.branches)) < len(row.branches):
                row.last_branches[index] = later[index]
            if action in (Action.STORE, Action.REUSE):
                later[index] = row.branches
