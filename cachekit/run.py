"""Hold everything that lives as long as one run: its clock, rows, kept tensors and counts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .clock import Clock
from .plan import Assignment, Branches, Composer, Plan, Row
from .policy import Action, Moment
from .sites import Kind, Region
from .store import Slot, Store, narrow_kept, split_kept

if TYPE_CHECKING:
    from .policy import Streams

_ALONE: Branches = ("cond",)
_COUNTED = (Action.COMPUTE, Action.STORE, Action.REUSE)


class RunState(threading.local):
    """Hold the present run and call of each thread; a deep copy starts empty."""

    run: Run | None = None
    call: Call | None = None
    paused: int = 0
    pipeline: tuple[Any, dict[str, Any]] | None = None
    replay: list[Row]  # rows that the next calls obey, last first

    def __init__(self) -> None:
        """Begin with no run, once in each thread."""
        self.replay = []

    def __deepcopy__(self, memo: dict[int, Any]) -> RunState:
        """Return a fresh state: a run is never shared with a copy of the model."""
        return RunState()


@dataclass
class Record:
    """Hold what a run leaves behind: numbers and shapes, no tensors with values.

    `rows` are the steps as planned or decided; `calls` pairs each forward's batch with what really happened in
    it, misses and probes included; `inputs` holds the shapes of the arguments by batch.
    """

    steps: int
    guided: bool
    exact: bool
    rows: list[Row] = field(default_factory=list)
    calls: list[tuple[int, Row]] = field(default_factory=list)
    counts: list[dict[Action, int]] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    deciding_seconds: float = 0.0
    traces: dict[str, list[Any]] = field(default_factory=dict)
    inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    interrupted: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


class Run:
    """Drive one run: find the row of each call and own what is kept."""

    def __init__(self, assignments: Sequence[Assignment], clock: Clock) -> None:
        """Start before the first call; `begin` follows when the first call shows batch and steps."""
        self.assignments = assignments
        self.clock = clock
        self.store = Store()
        self.shapes: dict[tuple[Slot, str], tuple[Any, int]] = {}
        self.templates: dict[Slot, Any] = {}
        self.memories: dict[str, dict[str, Any]] = {bound.policy.name: {} for bound in assignments}
        self.probed: dict[tuple[str, Branches, int], dict[str, Any]] = {}
        self.order: Branches = _ALONE
        self.signature: tuple[Any, ...] = ()
        self.guidance = [i for i, bound in enumerate(assignments) if bound.target.kind is Kind.GUIDANCE]
        self._blocks = [i for i, bound in enumerate(assignments) if bound.target.kind is Kind.BLOCK]

    def begin(self, plan: Plan, order: Branches, steps: int) -> None:
        """Begin with the plan of `steps` steps over the branches in `order`."""
        self.plan = plan
        self.order = order
        self._composer: Composer | None = None
        self.record = Record(steps, len(order) > 1, self.clock.exact)
        self.record.counts = [dict.fromkeys(_COUNTED, 0) for _ in self.assignments]
        self.record.missed = [0] * len(self.assignments)
        if not plan.is_static:
            self._composer = Composer(self.assignments, steps, order)

    def change_order(self, order: Branches) -> None:
        """Follow a pipeline that itself changes its branches in the middle of a run."""
        done = len(self.record.rows)
        if self._composer is None:
            self._composer = Composer(self.assignments, self.record.steps, self.order)
            for step in range(done):
                self._composer.row(step, self._decide)
        self.order = self._composer.order = order

    def row(self, step: int) -> Row:
        """Return the row of `step`, composing those not yet reached."""
        rows = self.record.rows
        while len(rows) <= step:
            self.enter(self._next_row(len(rows)))
        return rows[step]

    def enter(self, row: Row) -> None:
        """Begin a step; when its branches differ from the last one's, what is kept follows."""
        rows = self.record.rows
        if rows and row.branches != rows[-1].branches:
            changes = [bound.policy.on_branch_change for bound in self.assignments]
            self.store.change_branches(row.branches, changes)
        rows.append(row)

    def _next_row(self, step: int) -> Row:
        if self._composer is None and step < len(self.plan.rows):
            return self.plan.rows[step]
        if self._composer is None:
            self.change_order(self.order)
        assert self._composer is not None
        return self._composer.row(step, self._decide)

    def _decide(self, bound: Assignment, at: Moment) -> Action | None:
        if isinstance(bound.target, Region) and bound.target.probe:
            return None
        return bound.policy.decide(bound.target, at, self.memories[bound.policy.name])

    def serves(self, batch: int) -> bool:
        """Tell whether a call's batch is that of the step's first call; an odd one out runs uncached."""
        return not self.signature or self.clock.call == 0 or batch == self.signature[0] * len(self.order)

    def begin_call(self, step: int) -> Call:
        """Return the call of `step`, with every block that has nothing to reuse turned into STORE."""
        call = Call(self, self.row(step), self.clock.call)
        for index in self._blocks:
            if call.actions[index] is Action.REUSE and call.kept(index) is None:
                call.miss(index)
                call.actions[index] = Action.STORE
        return call

    def forget(self) -> None:
        """Let go of every tensor, even where the frames of an exception hold this run."""
        self.store.clear()
        self.memories.clear()
        self.probed.clear()

    def finish(self) -> Record:
        """Return the record with its final figures."""
        self.record.peak_bytes = self.store.peak_bytes
        self.record.traces = {
            name: list(memory["trace"]) for name, memory in self.memories.items() if "trace" in memory
        }
        return self.record


class Call:
    """Hold the actions of one forward of the denoiser."""

    __slots__ = ("actions", "branches", "entries", "ordinal", "row", "run", "sample", "timestep")

    def __init__(self, run: Run, row: Row, ordinal: int) -> None:
        """Start the `ordinal`-th call of a step with its row's actions; probes and misses change them for it alone."""
        self.run = run
        self.ordinal = ordinal
        self.actions = list(row.actions)
        self.row = replace(row, actions=self.actions)
        self.branches = row.branches
        self.entries: dict[int, Streams] = {}
        self.sample: Tensor | None = None
        self.timestep: Any = None

    def moment(self, index: int) -> Moment:
        """Return the moment that policy methods are told."""
        return Moment(self.row.step, self.run.record.steps, self.row.origins[index])

    def slot(self, index: int) -> Slot:
        """Return where the store keeps what assignment `index` keeps in this call."""
        return (index, self.ordinal)

    def kept(self, index: int) -> Any:
        """Return what assignment `index` has kept for this call and its branches, or None."""
        return self.run.store.get(self.slot(index), self.branches)

    def count(self, index: int, action: Action) -> None:
        """Count what really happened."""
        self.run.record.counts[index][action] += 1

    def miss(self, index: int) -> None:
        """Count a reuse that found nothing; the site is computed instead."""
        self.run.record.missed[index] += 1

    def keep(self, index: int, kept: Any) -> None:
        """Keep, at once in the form of the branches that will read it where the plan knows them."""
        branches = self.branches
        last = self.row.last_branches.get(index)
        if last is not None:
            change = self.run.assignments[index].policy.on_branch_change
            narrowed = narrow_kept(split_kept(kept, branches), last, change)
            if narrowed is not None:
                self.run.store.drop(self.slot(index), branches)
                branches, kept = last, narrowed
        self.run.store.put(self.slot(index), branches, kept)

    def decide(self, index: int, value: Streams) -> None:
        """Let the policy decide from its probe; a reuse needs something kept."""
        policy = self.run.assignments[index].policy
        memory = self.run.probed.setdefault((policy.name, self.branches, self.ordinal), {})
        target = self.run.assignments[index].target
        action = policy.probe(target, self.moment(index), value, memory)
        if action is Action.REUSE and self.kept(index) is None:
            self.miss(index)
            action = Action.STORE
        self.actions[index] = action

    def count_guidance(self) -> list[int]:
        """Count a call of all branches for the policies that choose among them; return those that keep something."""
        for index in self.run.guidance:
            self.count(index, self.actions[index] or Action.COMPUTE)
        return [index for index in self.run.guidance if self.actions[index] is Action.STORE]

    @property
    def narrowed_by(self) -> int:
        """Return the guidance assignment that dropped a branch in this call, or -1."""
        return self.row.narrowed_by
