"""One forward of a denoiser, and the actions planned for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cachekit.interface.indicators import Indicator, Signal
from cachekit.interface.moment import OPEN, Action, Entry, History, Moment, Streams, Time
from cachekit.interface.sites import Branches
from cachekit.planning.composer import time_of
from cachekit.planning.row import Row
from cachekit.runs.border import asked, decided, like_kept
from cachekit.runs.branches import BranchCalls, Caller
from cachekit.runs.keeping import Keeper
from cachekit.runs.quantities import give_back, give_whole, take, take_whole
from cachekit.runs.record import CallRecord
from cachekit.runs.store import Slot
from cachekit.tensors import no_elements, tensors, tree_map, with_tensors


class Call:
    """The actions of one forward of a denoiser.

    `branches` are those that its `batch` holds; `branch` is empty unless each has a call of its own. `entries` are
    the tensors that entered regions, by assignment, `probes` those that entered probes; `scratch` is memory for the
    outputs of skipped modules. `whole` is the assignment at the denoiser as a whole, if there is one. `duties` are what
    the modules do in this call, by name: switches read them.
    """

    __slots__ = (
        "actions", "batch", "branch", "branches", "calls", "counts", "denoiser", "duties", "entries", "keeper",
        "ordinal", "probes", "row", "scratch", "whole",
    )  # fmt: skip

    def __init__(
        self,
        keeper: Keeper,
        calls: BranchCalls,
        row: Row,
        caller: Caller,
        batch: int,
        ordinal: int = 0,
        whole: int | None = None,
    ) -> None:
        """Plan the `ordinal`-th call of its kind in a step, by the step's row; probes and misses change its actions."""
        self.keeper = keeper
        self.calls = calls
        self.denoiser, self.branch = caller
        self.batch = batch
        self.ordinal = ordinal
        self.actions = list(row.actions)
        self.row = Row(row.step, row.branches, self.actions, row.narrowed_by, row.origins, row.last_branches)
        self.branches: Branches = (self.branch,) if self.branch else row.branches
        self.entries: dict[int, Streams] = {}
        self.probes: dict[int, Streams] = {}
        self.counts = keeper.record.counts
        self.scratch: Any = None
        self.duties: Mapping[str, Any] = {}
        self.whole = whole

    @property
    def narrowed_by(self) -> int | None:
        """The guidance assignment that dropped a branch in this call, or None."""
        return self.row.narrowed_by

    @property
    def is_dropped(self) -> bool:
        """Whether the output of another branch's call replaces this one's."""
        if self.narrowed_by is None or self.branch not in self.calls.layout.order or self.branch in self.row.branches:
            return False
        return self.row.branches[0] in self.calls.outputs

    @property
    def is_left_out(self) -> bool:
        """Whether the denoiser does not run: its output is predicted."""
        return self.whole is not None and self.actions[self.whole] is Action.REUSE

    @property
    def is_narrowed(self) -> bool:
        """Whether a branch is cut from the batch of this call."""
        return self.narrowed_by is not None and not self.branch

    @property
    def lacks_branch(self) -> bool:
        """Whether the dropped branch's output is made from kept tensors, and there are none."""
        index = self.narrowed_by
        if index is None or self.keeper.assignments[index].choice.what.entries == 0:
            return False
        return not self.keeper.store.has(self.slot(index), ())

    def widen(self) -> None:
        """Run all branches after all, and store anew what stands in for one of them."""
        index = self.narrowed_by
        assert index is not None
        self.miss(index)
        self.actions[index] = Action.STORE
        self.row = replace(self.row, narrowed_by=None, branches=self.calls.layout.order)
        self.branches = (self.branch,) if self.branch else self.row.branches

    def record(self, runs: bool) -> CallRecord:
        """Describe what this call's cost depends on; `runs` is whether the denoiser runs."""
        if runs:  # then it is neither dropped nor left out, which isn't looked up again
            return CallRecord(self.denoiser, self.branch, self.batch, self.row)
        return CallRecord(self.denoiser, self.branch, self.batch, self.row, self.is_dropped, self.is_left_out)

    def moment(self, index: int, branches: Branches | None = None) -> Moment:
        """Make the moment that the parts of assignment `index` are given, for some of the call's branches or all."""
        keeper, step, bound = self.keeper, self.row.step, self.keeper.assignments[index]
        of = self.branches if branches is None else branches
        return Moment(
            step,
            keeper.record.steps,
            self.row.origins[index],
            self._time,
            bound.target,
            of,
            keeper.memories.of_target(index, of, self.ordinal),
            keeper.memories.of(bound.policy.name),
        )

    def action(self, index: int) -> Action:
        """Get what is done for an assignment; what is still open is computed."""
        found = self.actions[index]
        return Action.COMPUTE if found is OPEN else found

    @property
    def _time(self) -> Time:
        return time_of(self.keeper.record.times, self.row.step)

    # -- what is kept -------------------------------------------------------------------------------------

    def slot(self, index: int) -> Slot:
        """Name the place in the store of assignment `index` for this call."""
        return (index, self.ordinal)

    def keeps(self, index: int) -> bool:
        """Whether assignment `index` has kept anything for this call and its branches."""
        return self.keeper.store.has(self.slot(index), self.branches)

    def keep(self, index: int, tensors: Streams) -> None:
        """Keep tensors of this call, reduced to the branches that will read them where the plan shows these."""
        if self.keeper.assignments[index].choice.what.watches:
            self._show_kept(index, tensors)
        last = self.row.last_branches.get(index) if len(self.branches) > 1 else None
        entry = Entry(tensors, self._time)
        self.keeper.push(self.slot(index), self.branches, entry, last)

    def _show_kept(self, index: int, kept: Streams) -> None:
        bound, at = self.keeper.assignments[index], self.moment(index)
        asked(bound, "watch", at, bound.choice.what.watch, kept, self._joint_history(index), at)

    def _joint_history(self, index: int) -> History:
        """Get the one history of this call's branches; nothing where each has its own."""
        histories = self.keeper.store.read(self.slot(index), self.branches)
        return histories[0][1] if len(histories) == 1 else ()

    def predicted(self, index: int, given: Streams = ()) -> Streams | None:
        """Predict the tensors of a skipped target from what is kept; None where nothing is.

        `given` has the branches of this call along dimension 0.
        """
        histories = self.keeper.store.read(self.slot(index), self.branches)
        if not histories:
            return None
        made = [self._predicted(index, branches, history, given) for branches, history in histories]
        return made[0] if len(made) == 1 else tuple(map(torch.cat, zip(*made)))

    def _predicted(self, index: int, branches: Branches, history: History, given: Streams) -> Streams:
        bound, at = self.keeper.assignments[index], self.moment(index, branches)
        found = asked(bound, "predict", at, bound.choice.what.predict, history, at, self._part(given, branches))
        return like_kept(bound, "predict", at, found, history[0].tensors)

    # -- the denoiser as a whole --------------------------------------------------------------------------

    def predict_output(self, sample: Tensor) -> Any:
        """Make the denoiser's output from what is kept, and from its present sample `(branches * batch, ...)`."""
        index = self.whole
        assert index is not None
        self._took(index, Signal((sample,)))
        made = self.predicted(index, (sample,))
        assert made is not None, "a call is left out where something is kept"
        self.count(index, Action.REUSE)
        quantity = self.keeper.assignments[index].choice.what.of
        given = give_whole(quantity, made, sample, self.moment(index).time)
        # Pipelines may edit the output in place.
        own = given if given is not made else tuple(tensor.clone() for tensor in made)
        return with_tensors(self.keeper.templates[self.slot(index)], own)

    def take_output(self, output: Any, sample: Tensor) -> Any:
        """Keep what the denoiser has computed, and have the stand-in amend it where it does so."""
        index = self.whole
        assert index is not None
        action, what = self.action(index), self.keeper.assignments[index].choice.what
        self.count(index, action)
        streams, slot, signal = tuple(tensors(output)), self.slot(index), Signal((sample,))
        self._took(index, signal)
        self._learn(index, streams, signal)
        if action is not Action.STORE:
            return output
        amended = self._amended(index, streams, sample) if what.amends else streams
        time = self._time
        kept = take_whole(what.of, streams, sample, time)
        self.keep(index, tuple(map(torch.clone, kept)) if kept is streams else kept)
        self.keeper.templates[slot] = tree_map(no_elements, output)
        return output if amended is streams else with_tensors(output, amended)

    def _amended(self, index: int, streams: Streams, sample: Tensor) -> Streams:
        """Ask the stand-in to correct what was computed."""
        bound, at = self.keeper.assignments[index], self.moment(index)
        history = self._joint_history(index)
        found = asked(bound, "amend", at, bound.choice.what.amend, streams, history, at, (sample,))
        return like_kept(bound, "amend", at, found, streams)

    def _part(self, given: Streams, branches: Branches) -> Streams:
        if branches == self.branches:
            return given
        place = self.branches.index(branches[0])
        return tuple(tensor.chunk(len(self.branches))[place] for tensor in given)

    # -- guidance -----------------------------------------------------------------------------------------

    def keep_branch(self, index: int, outputs: Mapping[str, Streams]) -> None:
        """Keep, of both branches' outputs, what a guidance choice needs in place of one of them."""
        bound = self.keeper.assignments[index]
        stays = bound.stays(self.calls.layout)
        (dropped,) = [branch for branch in outputs if branch != stays]
        time = self._time
        kept = take(bound.choice.what.of, outputs[dropped], outputs[stays], time)
        self.keeper.push(self.slot(index), (), Entry(kept, time))

    def restored_branch(self, output: Streams) -> Streams:
        """Make the dropped branch's output from that of the branch that ran, both `(batch, ...)`."""
        index = self.narrowed_by
        assert index is not None
        self.count(index, Action.REUSE)
        bound, at = self.keeper.assignments[index], self.moment(index)
        what = bound.choice.what
        history = next((history for _, history in self.keeper.store.read(self.slot(index), ())), ())
        if not history:
            return output
        found = asked(bound, "predict", at, what.predict, history, at, output)
        return give_back(what.of, like_kept(bound, "predict", at, found, history[0].tensors), output, at.time)

    # -- decisions and counts -----------------------------------------------------------------------------

    def show(self, index: int, signal: Signal) -> None:
        """Show a region's indicator the signal of this call, which decides where the action is open.

        A reuse becomes a store if nothing is kept.
        """
        if self.keeper.is_replayed:
            return
        if self.actions[index] is OPEN:
            at = self.moment(index)
            action = decided(self.keeper.assignments[index], signal, at, self.keeper.vote)
            if action is Action.REUSE and not self.keeps(index):
                self.miss(index)
                action = Action.STORE
            self.actions[index] = action
        self._took(index, signal)

    def _took(self, index: int, signal: Signal) -> None:
        bound = self.keeper.assignments[index]
        if isinstance(bound.choice.when, Indicator) and not self.keeper.is_replayed:
            at = self.moment(index)
            asked(bound, "took", at, bound.choice.when.took, signal, at, self.actions[index] is not Action.REUSE)

    def _learn(self, index: int, output: Streams, signal: Signal) -> None:
        bound = self.keeper.assignments[index]
        if isinstance(bound.choice.when, Indicator) and not self.keeper.is_replayed:
            at = self.moment(index)
            asked(bound, "learn", at, bound.choice.when.learn, output, signal, at)

    def note_output(self, output: Any) -> None:
        """Take note of the output of this call, for the report's warning of NaN and inf."""
        self.keeper.note_output(self.row, self.denoiser, tensors(output))

    def count(self, index: int, action: Action) -> None:
        """Count an action of assignment `index`."""
        self.counts[index][action] += 1

    def miss(self, index: int) -> None:
        """Count a reuse that found nothing kept."""
        self.keeper.record.missed[index] += 1

    def count_guidance(self, guidance: list[int]) -> list[int]:
        """Count a call of all branches for these assignments; list those that keep something of it."""
        for index in guidance:
            self.count(index, self.action(index))
        return [index for index in guidance if self.actions[index] is Action.STORE and not self.is_left_out]
