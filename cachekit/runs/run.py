"""Everything that lives as long as one run: clock, rows, kept tensors and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cachekit.interface.adapter import Layout
from cachekit.interface.policy import Action, Moment
from cachekit.interface.sites import Branches, Kind, Region
from cachekit.planning.assignments import Assignment
from cachekit.planning.composer import Composer
from cachekit.planning.plan import Plan
from cachekit.planning.row import Row
from cachekit.reports.record import Record
from cachekit.runs.call import Call
from cachekit.runs.clock import Clock, Mark
from cachekit.runs.store import Slot, Store
from cachekit.tensors import is_finite

_COUNTED = (Action.COMPUTE, Action.STORE, Action.REUSE)


class Run:
    """Drive one run: find the row of each call and own what is kept.

    `batch` is how many images a branch has, 0 before the first call; `kinds` is what each denoiser's sample is like.
    """

    def __init__(
        self, assignments: Sequence[Assignment], clock: Clock, vote: Callable[[Action], Action], store: Store
    ) -> None:
        """Start before the first call; `begin` follows when the first call shows batch and steps.

        `vote` makes one action of those that the processes which share the image ask for; `store` is for this run
        alone.
        """
        self.assignments = assignments
        self.clock = clock
        self.vote = vote
        self.store = store
        self.shapes: dict[tuple[Slot, str], tuple[Any, int]] = {}
        self.templates: dict[Slot, Any] = {}
        self.memories: dict[str, dict[str, Any]] = {bound.policy.name: {} for bound in assignments}
        self.probed: dict[tuple[str, str, Branches, int], dict[str, Any]] = {}
        self.outputs: dict[str, Any] = {}
        self.batch = 0
        self.kinds: dict[str, tuple[Any, ...]] = {}
        self.told: tuple[Any, ...] = ()
        self.is_named = False
        self.guidance = [i for i, bound in enumerate(assignments) if bound.target.kind is Kind.GUIDANCE]
        self._blocks = [i for i, bound in enumerate(assignments) if bound.target.kind is Kind.BLOCK]
        self._sites = [i for i, bound in enumerate(assignments) if bound.target.kind is not Kind.GUIDANCE]
        self._seen: set[tuple[str, str]] = set()
        self._lost: set[Slot] = set()
        self._in_step: list[tuple[str, str]] = []
        self._called_apart: Layout | None = None
        self._next_layout: Layout | None = None

    def begin(self, plan: Plan, layout: Layout, steps: int) -> None:
        """Begin with the plan of `steps` steps over the branches of `layout`."""
        self.plan = plan
        self.layout = layout
        self._composer: Composer | None = None
        self.record = Record(steps, layout, self.clock.exact)
        self.record.counts = [dict.fromkeys(_COUNTED, 0) for _ in self.assignments]
        self.record.missed = [0] * len(self.assignments)
        if not plan.is_static:
            self._composer = Composer(self.assignments, steps, layout, plan.dropped)

    def change_layout(self, layout: Layout) -> None:
        """Follow a pipeline whose branches are others than at the beginning of the run."""
        done = len(self.record.rows)
        if self._composer is None:
            self._composer = Composer(self.assignments, self.record.steps, self.layout, self.plan.dropped)
            for step in range(done):
                self._composer.row(step, self._decide)
        self.layout = self._composer.layout = layout

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
            self.store.change_branches(row.branches, changes, rows[-1].branches)
            self._drop_what_is_not_finite(row.step)
        if self._composer is None and row.step < len(self.plan.rows):
            self.store.drop_all(self.plan.unread[row.step])
        rows.append(row)

    def _next_row(self, step: int) -> Row:
        if self._composer is None and step < len(self.plan.rows):
            return self.plan.rows[step]
        if self._composer is None:
            self.change_layout(self.layout)
        assert self._composer is not None
        return self._composer.row(step, self._decide)

    def _decide(self, bound: Assignment, at: Moment) -> Action | None:
        if isinstance(bound.target, Region) and bound.target.probe:
            return None
        return self.vote(bound.policy.decide(bound.target, at, self.memories[bound.policy.name]))

    @property
    def together(self) -> int:
        """Return how many branches lie in the batch of one call."""
        return 1 if self.layout.separate else len(self.layout.order)

    def serves(self, batch: int) -> bool:
        """Tell whether a call's batch is that of the step's first call; an odd one out runs uncached."""
        return not self.batch or self.clock.call == 0 or batch == self.batch * self.together

    def tick(self) -> None:
        """Begin a step when the clock says so: calls are numbered, and outputs belong to a step, from there."""
        if self.clock.call == 0:
            self._in_step.clear()
            self.outputs.clear()
            if self._next_layout is not None:
                self.change_layout(self._next_layout)
                self.record.layout, self._next_layout = self.layout, None

    def pass_by(self, mark: Mark) -> None:
        """Let the steps before a call go by that were uncached: what they would have kept anew is kept no more."""
        for passed in self.clock.left_behind(mark):
            self.clock.tick(passed)
            self.tick()
            row = self.row(self.clock.step)
            unkept = {index for index, action in enumerate(row.actions) if action in (Action.STORE, None)}
            self.store.drop_all(unkept)
            self._lost |= {(index, 0) for index in unkept.intersection(self.guidance)}

    def expect_guidance(self, context: str | None) -> None:
        """Go back to both branches with the next step, where guidance begins after a run was taken as unguided."""
        apart = self._called_apart
        if apart is not None and context in apart.order[1:] and self.layout.order == apart.order[:1]:
            self._next_layout = apart

    def branch_of_call(self, context: str | None) -> str:
        """Return the branch that the present call is for: by the pipeline's name for it, or by its place."""
        if not self.layout.separate:
            return context if context and self.is_named and context not in self.layout.order else ""
        place = min(self.clock.call, len(self.layout.order) - 1)
        return context or self.layout.order[place]

    def calls_one_branch(self) -> bool:
        """Tell whether a step is over in which only the first of several branches was called."""
        is_later = self.clock.step > 0 and self.clock.call == 0
        return self.layout.separate and is_later and len({branch for _, branch in self._seen}) == 1

    def take_as_alone(self) -> None:
        """Go on as if the one branch had been all from the beginning: no branch is dropped, so nothing is stale."""
        self._called_apart = self.layout
        self.change_layout(self.layout.alone)
        assert self._composer is not None
        self.record.layout, self._composer.branches = self.layout, self.layout.order
        self.record.rows = [replace(row, branches=self.layout.order) for row in self.record.rows]

    def begin_call(self, step: int, denoiser: str, branch: str) -> Call:
        """Return the call of `step`, with every block that has nothing to reuse turned into STORE.

        So is every site in a denoiser's first call when the run has begun without it: two denoisers may share
        one loop.
        """
        who = (denoiser, branch)
        self._drop_what_is_not_finite(len(self.record.rows) - 1)
        call = Call(self, self.row(step), denoiser, branch, self._in_step.count(who))
        if call.narrowed_by is not None and call.slot(call.narrowed_by) in self._lost:
            call.widen()
        is_late = step > 0 and who not in self._seen
        self._in_step.append(who)
        self._seen.add(who)
        if call.is_dropped:
            return call
        for index in self._sites if is_late else self._blocks:
            here = self.assignments[index].denoiser == denoiser
            if here and call.actions[index] is Action.REUSE and not call.keeps(index):
                if not is_late:
                    call.miss(index)
                call.actions[index] = Action.STORE
        return call

    @property
    def is_alone(self) -> bool:
        """Tell whether one denoiser makes all calls, each for all branches."""
        return len(self._seen) == 1

    def foresee(self, step: int, batch: int) -> Call | None:
        """Return the call of the next step before it is made, or None where something lost may change it."""
        (who,) = self._seen
        self._drop_what_is_not_finite(len(self.record.rows) - 1)
        call = Call(self, self.row(step), *who, ordinal=0)
        call.batch = batch
        is_lost = call.narrowed_by is not None and call.slot(call.narrowed_by) in self._lost
        return None if is_lost else call

    def put(self, slot: Slot, branches: Branches, kept: Any) -> None:
        """Keep what a call made; where there is no room, whoever wants it computes."""
        if not self.store.put(slot, branches, kept):
            self._discard(slot, branches, len(self.record.rows) - 1, "beyond max_cache_bytes")

    def _drop_what_is_not_finite(self, step: int) -> None:
        """Drop what was kept since the last look, in `step`, and is not finite: whoever wants it computes.

        Looked at where it may be read next, not where it was kept, so that a call waits for its kept tensors once.
        """
        fresh = self.store.take_fresh()
        self._lost -= {slot for slot, branches, _ in fresh if not branches}
        good = is_finite([kept for *_, kept in fresh])
        if not fresh or self._all_say(all(good)):
            return
        for (slot, branches, _), is_good in zip(fresh, good):
            if not self._all_say(is_good):
                self.store.drop(slot, branches)
                self._discard(slot, branches, step, "not finite")

    def _discard(self, slot: Slot, branches: Branches, step: int, why: str) -> None:
        self.record.discarded.append((self.assignments[slot[0]].policy.name, step, why))
        if not branches:
            self._lost.add(slot)

    def _all_say(self, good: bool) -> bool:
        return self.vote(Action.REUSE if good else Action.STORE) is Action.REUSE

    def forget(self) -> None:
        """Let go of every tensor, even where the frames of an exception hold this run."""
        self.store.clear()
        self.memories.clear()
        self.probed.clear()
        self.outputs.clear()

    def finish(self) -> Record:
        """Return the record with its final figures."""
        self.record.peak_bytes = self.store.peak_bytes
        self.record.traces = {
            name: list(memory["trace"]) for name, memory in self.memories.items() if "trace" in memory
        }
        return self.record
