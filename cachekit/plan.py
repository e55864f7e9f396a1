"""Compose policies into a plan: the table step x target -> action of a run, before or while it runs."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace

from .adapter import Layout
from .errors import ConflictError
from .picture import draw
from .policy import Action, BranchChange, Moment, Policy
from .sites import Branches, Kind, Region, Target

#: Asked for the cells that a rule leaves open; returns None where a probe decides inside the call.
Decide = Callable[["Assignment", Moment], "Action | None"]

_MARKS = {Action.COMPUTE: ".", Action.STORE: "S", Action.REUSE: "r", None: "?"}


@dataclass(frozen=True)
class Assignment:
    """Bind one policy to one target of a denoiser; the position in a plan's `assignments` is its index.

    The guidance is one for all denoisers of a pipeline: there `denoiser` is empty.
    """

    policy: Policy
    target: Target
    denoiser: str = ""


@dataclass
class Row:
    """Hold one step of a plan: the branches that run and an action per assignment.

    `narrowed_by` is the index of the guidance assignment that dropped a branch, or -1; `origins` are the steps at
    which each assignment's schedule last started anew; `last_branches` gives, for a STORE whose next reuse is
    known to come with fewer branches, those branches.
    """

    step: int
    branches: Branches
    actions: list[Action | None]
    narrowed_by: int = -1
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


def assign(chosen: Iterable[tuple[Policy, str, Sequence[Target]]]) -> tuple[Assignment, ...]:
    """Return the assignments of (policy, denoiser, targets); raise `ConflictError` where two policies collide.

    The guidance site is shared: there the policy that narrows first decides.
    """
    found: list[Assignment] = []
    for policy, denoiser, targets in chosen:
        for target in targets:
            is_guidance = target.kind is Kind.GUIDANCE
            if is_guidance and any(other.policy is policy and other.target is target for other in found):
                continue
            bound = Assignment(policy, target, "" if is_guidance else denoiser)
            _refuse_clash(bound, found)
            found.append(bound)
    return tuple(found)


def _refuse_clash(bound: Assignment, found: Iterable[Assignment]) -> None:
    for other in found:
        guidance = Kind.GUIDANCE in (bound.target.kind, other.target.kind)
        if other.policy is bound.policy or other.denoiser != bound.denoiser or guidance:
            continue
        if _clash(bound.target, other.target):
            raise ConflictError(
                f"{str(other.policy)!r} and {str(bound.policy)!r} would both write {bound.target.name!r};"
                " apply one of them"
            )


def _clash(one: Target, other: Target) -> bool:
    if one.kind is Kind.BLOCK and other.kind is Kind.BLOCK:
        return one.covers(_last(other)) or other.covers(_last(one))
    return one.name == other.name


def _last(target: Target) -> str:
    return target.exit if isinstance(target, Region) else target.name


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
        self.narrowed_by = -1
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
            self.narrowed_by = min(votes, key=lambda i: self.assignments[i].policy.name, default=-1)
        for index in self._guidance:
            if cells[index] is None and guided:
                continue
            stored = self.narrowed_by < 0 and cells[index] is Action.STORE and guided
            cells[index] = Action.STORE if stored else Action.COMPUTE
        if self.narrowed_by >= 0:
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
        return is_outer and outer.target.covers(_last(inner.target))

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
