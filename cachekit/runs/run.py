"""Everything that lives as long as one run."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from cachekit.interface.adapter import Layout
from cachekit.interface.indicators import Indicator, Signal
from cachekit.interface.moment import OPEN, Action, Moment
from cachekit.planning.composer import Composer
from cachekit.planning.plan import Plan
from cachekit.planning.row import Cell, Row
from cachekit.runs.border import agreed_action, asked, decided
from cachekit.runs.branches import BranchCalls, Caller
from cachekit.runs.call import Call
from cachekit.runs.clock import Clock, Mark
from cachekit.runs.keeping import Keeper, Voting
from cachekit.runs.record import Fit, Record
from cachekit.runs.store import Store
from cachekit.runs.voting import Vote

#: A call for which a row is composed: its caller, and the sample that indicators of the denoiser decide by.
Shown = tuple[Caller, Tensor]
_NO_ACTIONS = dict.fromkeys(Action, 0)


class Run:
    """One run: its rows so far, the branches of its calls, and what it keeps.

    `images` is the number of images of each branch; `guidance_state` is what the pipeline showed of its guidance in
    the last call.
    """

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        steps: int,
        images: int,
        *,
        clock: Clock | None = None,
        store: Store | None = None,
        vote: Voting | None = None,
        is_named: bool = False,
        fit: Fit | None = None,
        arguments: dict[str, Any] | None = None,
        is_replayed: bool = False,
    ) -> None:
        """Begin before the first row of `plan`; by default with an empty store and no other process to agree with."""
        self.plan = plan
        self.images = images
        self._started = time.perf_counter()
        self.clock = clock or Clock(exact=True)
        self.record = Record(
            steps,
            layout,
            self.clock.exact,
            counts=[_NO_ACTIONS.copy() for _ in plan.assignments],
            missed=[0] * len(plan.assignments),
            fit=fit,
            arguments=arguments or {},
            times=plan.times,
        )
        self.keeper = Keeper(plan.assignments, store or Store(), vote or Vote(), self.record, is_replayed)
        self.calls = BranchCalls(layout, is_named)
        self._composer = None if plan.is_static else self._new_composer(layout)
        self.guidance_state: tuple[Any, ...] = ()
        self._kinds: dict[str, tuple[Any, ...]] = {}

    @property
    def layout(self) -> Layout:
        """How the branches of the present step reach the denoisers."""
        return self.calls.layout

    # -- rows ---------------------------------------------------------------------------------------------

    def row(self, step: int, shown: Shown | None = None) -> Row:
        """Get the row of `step`, after those not yet reached; `shown` is the call for which it is composed."""
        rows = self.record.rows
        while len(rows) <= step:
            self.enter(self._next_row(len(rows), shown))
        return rows[step]

    def enter(self, row: Row) -> None:
        """Begin a step: convert what is kept to its branches, and drop what nothing reads any more."""
        rows = self.record.rows
        self.keeper.enter(row, rows[-1] if rows else None)
        if self._composer is None and row.step < len(self.plan.rows):
            self.keeper.store.drop_read(self.plan.unread[row.step])
        rows.append(row)

    def _next_row(self, step: int, shown: Shown | None) -> Row:
        if self._composer is None and step < len(self.plan.rows):
            return self.plan.rows[step]
        return self._composing().row(step, partial(self._decide, shown))

    def _new_composer(self, layout: Layout) -> Composer:
        return Composer(self.plan.assignments, self.record.steps, layout, self.plan.dropped, self.plan.times)

    def _composing(self) -> Composer:
        """Get the composer, which goes on where the plan's rows were left."""
        if self._composer is None:
            self._composer = self._new_composer(self.layout)
            for step in range(len(self.record.rows)):
                self._composer.row(step, partial(self._decide, None))
        return self._composer

    def _decide(self, shown: Shown | None, index: int, at: Moment) -> Cell:
        bound = self.plan.assignments[index]
        memories = self.keeper.memories
        at = at._replace(memory=memories.of_target(index, (), 0), shared=memories.of(bound.policy.name))
        if isinstance(bound.choice.when, Indicator):
            return self._decide_by_sample(shown, index, at) if bound.is_whole else OPEN
        action = asked(bound, "decide", at, bound.choice.when.decide, at)
        return self.keeper.vote(agreed_action(bound, "decide", at, action))

    def _decide_by_sample(self, shown: Shown | None, index: int, at: Moment) -> Cell:
        """Ask an indicator of the denoiser that makes the present call; others are computed."""
        bound = self.plan.assignments[index]
        if shown is None or shown[0][0] != bound.denoiser:
            return Action.STORE
        (_, branch), sample = shown
        branches = (branch,) if branch else self._composing().branches
        sample = sample if branch else self.calls.part(sample, branches)
        at = at._replace(branches=branches, memory=self.keeper.memories.of_target(index, branches, 0))
        return decided(bound, Signal((sample,)), at, self.keeper.vote)

    # -- branches and batch -------------------------------------------------------------------------------

    def serves(self, batch: int) -> bool:
        """Whether a call's batch is that of its step's first call; any other call runs uncached."""
        return self.clock.call == 0 or batch == self.images * self.calls.together

    def follow_batch(self, denoiser: str, sample: Tensor, mode: Any) -> None:
        """Follow a batch that changes in the middle of a run: guidance cut by the pipeline, or new shapes.

        Two denoisers that take turns may have shapes of their own. `mode` distinguishes calls that write keys and
        values, which are for more tokens than those that read them.
        """
        batch = sample.shape[0]
        images, kind = batch // self.calls.together, (sample.shape[1:], sample.dtype, sample.device, mode)
        if images == self.images and kind == self._kinds.setdefault(denoiser, kind):
            return
        if self.calls.together > 1 and batch == self.images:
            self._change_layout(self.layout.alone)
            return
        self.keeper.clear()
        self.images, self._kinds[denoiser] = images, kind

    def _change_layout(self, layout: Layout) -> Composer:
        composer = self._composing()
        self.calls.layout = composer.layout = layout
        return composer

    def _take_as_alone(self) -> None:
        """Continue as if the run had had one branch from the beginning: none is dropped, so nothing kept is stale."""
        layout = self.calls.take_as_alone()
        self._change_layout(layout).branches = layout.order
        self.record.layout = layout
        self.record.rows = [replace(row, branches=layout.order) for row in self.record.rows]

    # -- steps and calls ----------------------------------------------------------------------------------

    def pass_by(self, mark: Mark) -> None:
        """Count the uncached steps before the call at `mark`, and drop what they would have kept anew."""
        for passed in self.clock.left_behind(mark):
            self.clock.tick(passed)
            self._begin_step()
            self.keeper.skip(self.row(self.clock.step))

    def tick(self, mark: Mark) -> None:
        """Advance the clock to the call at `mark`."""
        self.pass_by(mark)
        self.clock.tick(mark)

    def begin_call(self, denoiser: str, context: str | None, batch: int, sample: Tensor) -> Call:
        """Begin the call that the clock is at; `context` is the pipeline's name for it.

        `sample` is what an indicator of the denoiser decides by in the first call of a step.

        A reuse of something not kept becomes a store: at blocks, and at every site in the first call of a denoiser
        that joins a run late (two denoisers may share one loop).
        """
        if self.calls.only_first_called(self.clock):
            self._take_as_alone()
        self._begin_step()
        self.keeper.memories.measure()
        self.calls.expect_guidance(context)
        step, caller = self.clock.step, (denoiser, self.calls.branch_of(self.clock.call, context))
        is_late = step > 0 and caller not in self.calls.seen
        self.keeper.drop_not_finite(len(self.record.rows) - 1)
        if is_late and all(name != denoiser for name, _ in self.calls.seen):
            self._composing().restart(denoiser, step)
        call = self._call(step, caller, batch, self.calls.number(caller), sample=sample)
        if call.lacks_branch:
            call.widen()
        if not call.is_dropped:
            self._store_what_is_not_kept(call, is_late)
        return call

    def _call(self, step: int, caller: Caller, batch: int, ordinal: int = 0, *, sample: Tensor) -> Call:
        row = self.row(step, (caller, sample))
        return Call(self.keeper, self.calls, row, caller, batch, ordinal, self.plan.wholes.get(caller[0]))

    def _begin_step(self) -> None:
        """Begin a step where the clock is at its first call."""
        if self.clock.call:
            return
        layout = self.calls.begin_step()
        if layout is not None:
            self._change_layout(layout)
            self.record.layout = layout

    def _store_what_is_not_kept(self, call: Call, is_late: bool) -> None:
        if call.whole is not None:
            self._store_if_lacking(call, call.whole, is_late)
        if call.is_left_out:
            return
        for index in self.plan.inner if is_late else self.plan.blocks:
            if self.plan.assignments[index].denoiser == call.denoiser:
                self._store_if_lacking(call, index, is_late)

    def _store_if_lacking(self, call: Call, index: int, is_late: bool) -> None:
        if call.actions[index] is Action.REUSE and not call.keeps(index):
            if not is_late:
                call.miss(index)
            call.actions[index] = Action.STORE

    @property
    def is_alone(self) -> bool:
        """Whether one denoiser makes all calls, each for all branches."""
        return len(self.calls.seen) == 1

    def foresee(self, step: int, batch: int, sample: Tensor) -> Call | None:
        """Plan the call of the next step before it is made; None where something lost may change it."""
        (caller,) = self.calls.seen
        self.keeper.drop_not_finite(len(self.record.rows) - 1)
        call = self._call(step, caller, batch, sample=sample)
        if call.is_left_out and call.whole is not None and not call.keeps(call.whole):
            return None
        return None if call.lacks_branch else call

    # -- the end ------------------------------------------------------------------------------------------

    def note_time(self) -> None:
        """Take note that the run has lasted until now."""
        self.record.seconds = time.perf_counter() - self._started

    def finish(self) -> Record:
        """Complete the record."""
        self.record.peak_bytes = self.keeper.store.peak_bytes
        self.keeper.memories.measure()
        self.record.memory_bytes = self.keeper.memories.peak_bytes
        self.record.traces = self.keeper.memories.traces()
        return self.record

    def forget(self) -> None:
        """Drop every tensor, even where the frames of an exception hold this run."""
        self.keeper.forget()
        self.calls.outputs.clear()
