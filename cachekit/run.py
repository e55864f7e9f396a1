"""Hold everything that lives as long as one run: its clock, rows, kept tensors and counts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .adapter import Layout
from .clock import Clock, Mark
from .errors import AttachmentError
from .finite import is_finite
from .plan import Assignment, Composer, Plan, Row
from .policy import Action, Moment
from .sites import Branches, Kind, Region
from .store import Slot, Store, narrow_kept, split_kept

if TYPE_CHECKING:
    from .budget import Fit
    from .policy import Streams
    from .report import Report

_COUNTED = (Action.COMPUTE, Action.STORE, Action.REUSE)


class RunState(threading.local):
    """Hold the present run and call of each thread; a deep copy starts empty.

    `reports` are of the runs that ended within the present call of a pipeline: one that calls others, or has a
    second loop, makes several. `context` is the name that the pipeline gives the present call, if any; `replayed`
    the call whose row the next one obeys instead of the clock.
    """

    run: Run | None = None
    call: Call | None = None
    paused: int = 0
    pipeline: tuple[Any, dict[str, Any]] | None = None
    context: str | None = None
    reports: tuple[Report, ...] = ()
    replayed: Made | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RunState:
        """Return a fresh state: a run is never shared with a copy of the model."""
        return RunState()

    def __reduce__(self) -> Any:
        """Raise: whoever unpickled it would have another denoiser."""
        raise AttachmentError("an attached denoiser cannot be pickled; call cachekit.remove(pipe) first")


@dataclass(frozen=True)
class Made:
    """Say of one call what its cost depends on.

    `branch` is the branch that the call is for, or empty for all that the batch holds. `row` is what really
    happened in it, misses and probes included; a call that was `dropped` did not run at all.
    """

    denoiser: str
    branch: str
    batch: int
    row: Row
    dropped: bool = False

    @property
    def inputs(self) -> tuple[str, str, int]:
        """Return what the shapes of the call's arguments depend on."""
        return (self.denoiser, self.branch, self.batch)

    @property
    def signature(self) -> tuple[object, ...]:
        """Return what makes two calls cost the same."""
        return (*self.inputs, self.dropped, self.row.signature)


@dataclass
class Record:
    """Hold what a run leaves behind: numbers and shapes, no tensors with values.

    `rows` are the steps as planned or decided; `calls` what was done in each call; `inputs` holds the shapes of
    the arguments of calls, by `Made.inputs`; `discarded` the policy, the step and the reason of each output that
    was not kept although it should have been; `shortened` counts a ControlNet's calls that left out what would
    be thrown away; `fit` what a budget left of the plan.
    """

    steps: int
    layout: Layout
    exact: bool
    rows: list[Row] = field(default_factory=list)
    calls: list[Made] = field(default_factory=list)
    counts: list[dict[Action, int]] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)
    discarded: list[tuple[str, int, str]] = field(default_factory=list)
    fit: Fit | None = None
    peak_bytes: int = 0
    deciding_seconds: float = 0.0
    shortened: int = 0
    traces: dict[str, list[Any]] = field(default_factory=dict)
    inputs: dict[tuple[str, str, int], tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    interrupted: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def guided(self) -> bool:
        """Tell whether the run had branches to choose from."""
        return len(self.layout.order) > 1


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
        if call.narrowed_by >= 0 and call.slot(call.narrowed_by) in self._lost:
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
        is_lost = call.narrowed_by >= 0 and call.slot(call.narrowed_by) in self._lost
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


class Call:
    """Hold the actions of one forward of a denoiser.

    `branches` are those that its `batch` holds; `branch` is empty unless each has a call of its own. `sample` and
    `timestep` are what observing policies see; a call that is only counted has none.
    """

    __slots__ = (
        "actions", "batch", "branch", "branches", "denoiser", "entries", "is_listed", "ordinal", "row", "run", "sample",
        "timestep",
    )  # fmt: skip

    def __init__(self, run: Run, row: Row, denoiser: str, branch: str, ordinal: int) -> None:
        """Start the `ordinal`-th like call of a step with its row's actions; probes and misses change them for it."""
        self.run = run
        self.denoiser = denoiser
        self.branch = branch
        self.ordinal = ordinal
        self.actions = list(row.actions)
        self.row = replace(row, actions=self.actions)
        self.branches: Branches = (branch,) if branch else row.branches
        self.entries: dict[int, Streams] = {}
        self.batch = 0
        self.is_listed = False
        self.sample: Tensor | None = None
        self.timestep: Any = None

    @property
    def is_dropped(self) -> bool:
        """Tell whether this call is of a branch that another one stands in for."""
        if self.narrowed_by < 0 or self.branch not in self.run.layout.order or self.branch in self.row.branches:
            return False
        return self.row.branches[0] in self.run.outputs

    def widen(self) -> None:
        """Run all branches, because what would stand in for one of them is lost, and keep it anew."""
        index = self.narrowed_by
        self.miss(index)
        self.actions[index] = Action.STORE
        self.row = replace(self.row, narrowed_by=-1, branches=self.run.layout.order)
        self.branches = (self.branch,) if self.branch else self.row.branches

    def made(self) -> Made:
        """Return what this call's cost depends on."""
        return Made(self.denoiser, self.branch, self.batch, self.row, self.is_dropped)

    def moment(self, index: int) -> Moment:
        """Return the moment that policy methods are told."""
        return Moment(self.row.step, self.run.record.steps, self.row.origins[index])

    def slot(self, index: int) -> Slot:
        """Return where the store keeps what assignment `index` keeps in this call."""
        return (index, self.ordinal)

    def kept(self, index: int) -> Any:
        """Return what assignment `index` has kept for this call and its branches, or None."""
        return self.run.store.get(self.slot(index), self.branches)

    def keeps(self, index: int) -> bool:
        """Tell whether assignment `index` has kept anything for this call and its branches."""
        return self.run.store.has(self.slot(index), self.branches)

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
        self.run.put(self.slot(index), branches, kept)

    def keep_branches(self, index: int, outputs: Mapping[str, tuple[Tensor, ...]]) -> None:
        """Keep what a guidance policy wants of the branches, for each tensor that the denoiser returns."""
        policy = self.run.assignments[index].policy
        each = [dict(zip(outputs, one)) for one in zip(*outputs.values())]
        self.run.put(self.slot(index), (), [policy.branches_to_keep(one) for one in each])

    def decide(self, index: int, value: Streams) -> None:
        """Let the policy decide from its probe; a reuse needs something kept."""
        policy = self.run.assignments[index].policy
        memory = self.run.probed.setdefault((policy.name, self.denoiser, self.branches, self.ordinal), {})
        target = self.run.assignments[index].target
        action = self.run.vote(policy.probe(target, self.moment(index), value, memory))
        if action is Action.REUSE and not self.keeps(index):
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
