"""One forward of a denoiser, and the actions planned for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cachekit.interface.policy import Action, Moment
from cachekit.interface.sites import Branches
from cachekit.planning.row import Row
from cachekit.reports.record import CallRecord
from cachekit.runs.store import Slot, narrow_kept, split_kept

if TYPE_CHECKING:
    from cachekit.interface.policy import Streams
    from cachekit.runs.run import Run


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
        if self.narrowed_by is None or self.branch not in self.run.layout.order or self.branch in self.row.branches:
            return False
        return self.row.branches[0] in self.run.outputs

    def widen(self) -> None:
        """Run all branches, because what would stand in for one of them is lost, and keep it anew."""
        index = self.narrowed_by
        assert index is not None
        self.miss(index)
        self.actions[index] = Action.STORE
        self.row = replace(self.row, narrowed_by=None, branches=self.run.layout.order)
        self.branches = (self.branch,) if self.branch else self.row.branches

    def made(self) -> CallRecord:
        """Return what this call's cost depends on."""
        return CallRecord(self.denoiser, self.branch, self.batch, self.row, self.is_dropped)

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
    def narrowed_by(self) -> int | None:
        """Return the guidance assignment that dropped a branch in this call, or None."""
        return self.row.narrowed_by
