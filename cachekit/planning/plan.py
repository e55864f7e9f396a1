"""The plan of a run: a table of steps, targets and actions."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cachekit.interface.adapter import Layout
from cachekit.interface.moment import OPEN, Action, Time
from cachekit.planning.assignments import Assignment
from cachekit.planning.composer import Composer, still_needed, undecided
from cachekit.planning.drawing import Column, draw
from cachekit.planning.row import Cell, Row

_MARKS = {Action.COMPUTE: ".", Action.STORE: "S", Action.REUSE: "r", OPEN: "?"}
_LEGEND = ". compute  S compute and keep  r reuse  ? decided during the run"


@dataclass(frozen=True)
class Plan:
    """The table of a run: a row for each step, a cell in it for each assignment.

    `attachment.plan(steps)` makes one. `str(plan)` prints it, `plan.picture()` draws it. `dropped` are the indices of
    assignments that compute in every step, because what they would keep doesn't fit into `max_cache_bytes`. `times`
    has the steps' places in the scheduler's table, where there is one.

    >>> from cachekit import GUIDANCE, After, Choice, Drop, Guidance, Kind, Policy, Reuse, Site, Sites
    >>> class Late(Policy):
    ...     name = "late"
    ...     start: int = 3
    >>> late, site = Late(start=4), Site("attn1", Kind.SELF_ATTENTION)
    >>> attention = Assignment(late, Choice(Sites(kinds="self_attention"), After(m=4), Reuse()), site)
    >>> guidance = Assignment(late, Choice(Guidance(), After(m=4), Drop()), GUIDANCE)
    >>> print(make_plan((attention, guidance), 11, Layout()))
    step                              0         1
                                      01234567890
    branches                          22221111111
    late:start=4  self_attention x 1  ...Srrrrrrr
    late:start=4  guidance x 1        ....rrrrrrr
    . compute  S compute and keep  r reuse  ? decided during the run
    """

    assignments: tuple[Assignment, ...]
    rows: tuple[Row, ...]
    dropped: frozenset[int] = frozenset()
    times: tuple[Time, ...] = ()

    def covers(self, outer: int, inner: int) -> bool:
        """Whether the target of assignment `inner` lies inside that of `outer`, another one: see `Assignment`."""
        return outer != inner and self.assignments[outer].covers(self.assignments[inner])

    @functools.cached_property
    def is_static(self) -> bool:
        """Whether every action is known before the run: no cell is open."""
        return all(OPEN not in row.actions for row in self.rows)

    @functools.cached_property
    def guidance(self) -> list[int]:
        """The assignments at the guidance site."""
        return [index for index, bound in enumerate(self.assignments) if bound.is_guidance]

    @functools.cached_property
    def wholes(self) -> dict[str, int]:
        """The assignments at denoisers as a whole, by name of the denoiser."""
        return {bound.denoiser: index for index, bound in enumerate(self.assignments) if bound.is_whole}

    @functools.cached_property
    def inner(self) -> list[int]:
        """The assignments at modules: blocks, regions and sites."""
        bounds = enumerate(self.assignments)
        return [index for index, bound in bounds if not bound.is_guidance and not bound.is_whole]

    @functools.cached_property
    def blocks(self) -> list[int]:
        """Those of them at blocks and regions."""
        return [index for index in self.inner if self.assignments[index].is_block]

    @functools.cached_property
    def unread(self) -> tuple[frozenset[tuple[int, str]], ...]:
        """What becomes unused at each step, as pairs of assignment and branch: its kept tensors are not read again.

        All sets are empty where the plan is not static.
        """
        found: list[set[tuple[int, str]]] = [set() for _ in self.rows]
        if self.is_static:
            for index, bound in enumerate(self.assignments):
                for branch in {name for row in self.rows for name in row.branches} if not bound.is_guidance else ():
                    for step in _ends(self.rows, index, branch, bound):
                        found[step].add((index, branch))
        return tuple(map(frozenset, found))

    def full(self, index: int) -> tuple[int, ...]:
        """List the steps in which assignment `index` isn't known to be reused."""
        return tuple(row.step for row in self.rows if row.actions[index] is not Action.REUSE)

    @functools.cached_property
    def idle(self) -> list[str]:
        """Specs of the policies that never act: they reuse nothing, and leave nothing to the run."""
        acting = {
            str(bound.policy)
            for index, bound in enumerate(self.assignments)
            if bound.choice.what.watches or any(row.actions[index] in (Action.REUSE, OPEN) for row in self.rows)
        }
        specs = dict.fromkeys(str(bound.policy) for bound in self.assignments)
        return [spec for spec in specs if spec not in acting]

    @property
    def warnings(self) -> list[str]:
        """A line for each policy that never acts."""
        return [
            f"{spec} never acts in {len(self.rows)} steps: give it other settings, or more steps" for spec in self.idle
        ]

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

    def _repr_svg_(self) -> str:
        """Draw the table, for notebooks."""
        return self.picture()

    def __repr__(self) -> str:
        """Summarise the plan in a line."""
        specs = " + ".join(dict.fromkeys(str(bound.policy) for bound in self.assignments)) or "no policy"
        return f"<Plan: {len(self.rows)} steps, {specs}, {len(self.assignments)} targets>"

    def __str__(self) -> str:
        """Print the table, then the warnings."""
        return "\n".join([self.table, *(f"warning: {warning}" for warning in self.warnings)])

    @property
    def table(self) -> str:
        """The table as text: a line for each distinct column, with a mark for each step, and a legend."""
        steps = range(len(self.rows))
        lines = [
            ("step", "".join(str(step // 10 % 10) if step % 10 == 0 else " " for step in steps)),
            ("", "".join(str(step % 10) for step in steps)),
            ("branches", "".join(str(len(row.branches)) for row in self.rows)),
        ]
        lines += self._labelled()
        width = max(len(label) for label, _ in lines)
        return "\n".join([*(f"{label:{width}}  {marks}" for label, marks in lines), _LEGEND])

    def _labelled(self) -> Iterator[tuple[str, str]]:
        """Yield the label and the marks of each distinct column; targets are named where their number doesn't do."""
        names: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for spec, name, kind, marks in self.columns():
            names[spec, kind, marks].append(name)
        rows = Counter((spec, kind) for spec, kind, _ in names)
        for (spec, kind, marks), alike in names.items():
            which = " to ".join(dict.fromkeys((alike[0], alike[-1])))
            yield f"{spec}  {kind} x {len(alike)}{f' ({which})' if rows[spec, kind] > 1 else ''}", marks


def make_plan(
    assignments: tuple[Assignment, ...],
    steps: int,
    layout: Layout,
    dropped: frozenset[int] = frozenset(),
    times: tuple[Time, ...] = (),
) -> Plan:
    """Plan a run of `steps` steps, in which `dropped` assignments only compute; `times` are of the scheduler.

    Cells that only the run can decide stay open.
    """
    composer = Composer(assignments, steps, layout, dropped, times)
    rows = tuple(composer.row(step, undecided) for step in range(steps))
    plan = Plan(assignments, rows, dropped, times)
    # Where branches come one by one, what is kept of the first waits for the second.
    if plan.is_static and not layout.separate and len({row.branches for row in rows}) > 1:
        _mark_narrowing_stores(rows, assignments)
    return plan


def _mark_narrowing_stores(rows: Sequence[Row], assignments: Sequence[Assignment]) -> None:
    """Set `Row.last_branches`: the branches that read each STORE, where they are fewer than those that make it."""
    # Most of the many targets of a choice have equal columns.
    alike: defaultdict[tuple[int, tuple[Cell, ...]], list[int]] = defaultdict(list)
    for index, column in enumerate(zip(*(row.actions for row in rows))):
        alike[id(assignments[index].choice), column].append(index)
    for (_, column), indices in alike.items():
        for row, readers in _last_readers(rows, column, assignments[indices[0]]):
            row.last_branches.update(dict.fromkeys(indices, readers))


def _last_readers(
    rows: Sequence[Row], column: Sequence[Cell], bound: Assignment
) -> Iterator[tuple[Row, tuple[str, ...]]]:
    """Yield each row whose STORE in a column is read by fewer branches than make it, and these."""
    needed: defaultdict[str, float] = defaultdict(float)
    for row, action in zip(reversed(rows), reversed(column)):
        readers = tuple(branch for branch in row.branches if needed[branch])
        if action is Action.STORE and 0 < len(readers) < len(row.branches):
            yield row, readers
        for branch in row.branches:
            needed[branch] = still_needed(needed[branch], action, bound)


def _ends(rows: Sequence[Row], index: int, branch: str, bound: Assignment) -> Iterable[int]:
    """Yield each step from which nothing reads what is kept of a branch, until it is replaced if it ever is."""
    needed: float = 0
    for step in range(len(rows) - 1, -1, -1):
        was_needed = needed
        if branch in rows[step].branches:
            needed = still_needed(needed, rows[step].actions[index], bound)
        if needed and not was_needed and step + 1 < len(rows):
            yield step + 1
