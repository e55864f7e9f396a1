"""One forward of a denoiser, and the actions planned for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from cachekit.interface.policy import Action, Moment, Streams
from cachekit.interface.sites import Branches
from cachekit.planning.row import Row
from cachekit.reports.record import CallRecord
from cachekit.runs.branches import BranchCalls, Caller
from cachekit.runs.keeping import Keeper
from cachekit.runs.store import Slot, narrow_kept, split_kept


class Call:
    """The actions of one forward of a denoiser.

    `branches` are those that its `batch` holds; `branch` is empty unless each has a call of its own. `entries` are
    the tensors that entered regions, by assignment; `scratch` is memory for the outputs of skipped modules.
    """

    __slots__ = (
        "actions", "batch", "branch", "branches", "calls", "counts", "denoiser", "entries", "keeper", "ordinal", "row",
        "scratch",
    )  # fmt: skip

    def __init__(
        self, keeper: Keeper, calls: BranchCalls, row: Row, caller: Caller, batch: int, ordinal: int = 0
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
        self.counts = keeper.record.counts
        self.scratch: Any = None

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
    def is_narrowed(self) -> bool:
        """Whether a branch is cut from the batch of this call."""
        return self.narrowed_by is not None and not self.branch

    @property
    def needs_lost(self) -> bool:
        """Whether what replaces the dropped branch's output has been lost."""
        return self.narrowed_by is not None and self.keeper.is_lost(self.slot(self.narrowed_by))

    def widen(self) -> None:
        """Run all branches, and keep anew what replaces the output of one."""
        index = self.narrowed_by
        assert index is not None
        self.miss(index)
        self.actions[index] = Action.STORE
        self.row = replace(self.row, narrowed_by=None, branches=self.calls.layout.order)
        self.branches = (self.branch,) if self.branch else self.row.branches

    def record(self) -> CallRecord:
        """Describe what this call's cost depends on."""
        return CallRecord(self.denoiser, self.branch, self.batch, self.row, self.is_dropped)

    def moment(self, index: int) -> Moment:
        """Make the moment that methods of the policy of assignment `index` are given."""
        return Moment(self.row.step, self.keeper.record.steps, self.row.origins[index])

    # -- what is kept -------------------------------------------------------------------------------------

    def slot(self, index: int) -> Slot:
        """Name the place in the store of assignment `index` for this call."""
        return (index, self.ordinal)

    def kept(self, index: int) -> Any:
        """Get what assignment `index` has kept for this call and its branches, or None."""
        return self.keeper.store.get(self.slot(index), self.branches)

    def keeps(self, index: int) -> bool:
        """Whether assignment `index` has kept anything for this call and its branches."""
        return self.keeper.store.has(self.slot(index), self.branches)

    def keep(self, index: int, kept: Any) -> None:
        """Keep tensors, already reduced to the branches that will read them where the plan shows these."""
        branches = self.branches
        last = self.row.last_branches.get(index)
        if last is not None:
            change = self.keeper.assignments[index].policy.on_branch_change
            narrowed = narrow_kept(split_kept(kept, branches), last, change)
            if narrowed is not None:
                self.keeper.store.drop(self.slot(index), branches)
                branches, kept = last, narrowed
        self.keeper.put(self.slot(index), branches, kept)

    def keep_branches(self, index: int, outputs: Mapping[str, tuple[Tensor, ...]]) -> None:
        """Keep what a guidance policy wants of the branches, for each tensor that the denoiser returns."""
        policy = self.keeper.assignments[index].policy
        each = [dict(zip(outputs, one)) for one in zip(*outputs.values())]
        self.keeper.put(self.slot(index), (), [policy.branches_to_keep(one) for one in each])

    # -- decisions and counts -----------------------------------------------------------------------------

    def decide(self, index: int, value: Streams) -> None:
        """Ask the policy for an action, from the tensors at its probe; a reuse becomes a store if nothing is kept."""
        bound = self.keeper.assignments[index]
        memory = self.keeper.memories.of_probe(bound.policy.name, self.denoiser, self.branches, self.ordinal)
        action = self.keeper.vote(bound.policy.probe(bound.target, self.moment(index), value, memory))
        if action is Action.REUSE and not self.keeps(index):
            self.miss(index)
            action = Action.STORE
        self.actions[index] = action

    def count(self, index: int, action: Action) -> None:
        """Count what has happened."""
        self.counts[index][action] += 1

    def miss(self, index: int) -> None:
        """Count a reuse that found nothing kept."""
        self.keeper.record.missed[index] += 1

    def count_guidance(self, guidance: list[int]) -> list[int]:
        """Count a call of all branches for these assignments; list those that keep something of it."""
        for index in guidance:
            self.count(index, self.actions[index] or Action.COMPUTE)
        return [index for index in guidance if self.actions[index] is Action.STORE]
