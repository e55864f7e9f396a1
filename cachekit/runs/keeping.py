"""What one run keeps for its later steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cachekit.interface.policy import OPEN, Action
from cachekit.interface.sites import Branches
from cachekit.planning.assignments import Assignment
from cachekit.planning.row import Row
from cachekit.reports.record import Record
from cachekit.runs.memories import Memories
from cachekit.runs.store import Slot, Store
from cachekit.tensors import is_finite

#: Agrees on an action with the other processes that share an image.
Voting = Callable[[Action], Action]


class Keeper:
    """The kept tensors of one run, the shapes and structures they come in, and the memories of policies.

    `shapes` are those of skipped modules' outputs, with the number of branches they hold; `templates` are outputs
    without elements, which kept tensors are put back into.
    """

    def __init__(self, assignments: Sequence[Assignment], store: Store, vote: Voting, record: Record) -> None:
        """Keep in `store`, agree with other processes by `vote`, and count in `record`."""
        self.assignments = assignments
        self.store = store
        self.vote = vote
        self.record = record
        self.memories = Memories(bound.policy.name for bound in assignments)
        self.shapes: dict[tuple[Slot, str], tuple[Any, int]] = {}
        self.templates: dict[Slot, Any] = {}
        self._lost: set[Slot] = set()

    def put(self, slot: Slot, branches: Branches, kept: Any) -> None:
        """Keep what a call made; without room for it, later steps compute."""
        if not self.store.put(slot, branches, kept):
            self._discard(slot, branches, len(self.record.rows) - 1, "beyond max_cache_bytes")

    def is_lost(self, slot: Slot) -> bool:
        """Whether what was kept of the branches together, for guidance, has been lost."""
        return slot in self._lost

    def enter(self, row: Row, before: Row | None) -> None:
        """Convert what is kept where a step's branches differ from those of the step before."""
        if before is not None and row.branches != before.branches:
            changes = [bound.policy.on_branch_change for bound in self.assignments]
            self.store.change_branches(row.branches, changes, before.branches)
            self.drop_not_finite(row.step)

    def skip(self, row: Row, guidance: Sequence[int]) -> None:
        """Drop what an uncached step would have kept anew: later steps compute it."""
        unkept = {index for index, action in enumerate(row.actions) if action in (Action.STORE, OPEN)}
        self.store.drop_all(unkept)
        self._lost |= {(index, 0) for index in unkept.intersection(guidance)}

    def drop_not_finite(self, step: int) -> None:
        """Drop what was kept since the last check, in `step`, and holds NaN or inf; later steps compute it.

        Checked where it may be read next, not where it was kept: one device sync for all tensors of a call.
        """
        fresh = self.store.take_fresh()
        if not fresh:
            return
        self._lost -= {slot for slot, branches, _ in fresh if not branches}
        good = is_finite([kept for *_, kept in fresh])
        if self._agree(all(good)):
            return
        for (slot, branches, _), is_good in zip(fresh, good):
            if not self._agree(is_good):
                self.store.drop(slot, branches)
                self._discard(slot, branches, step, "not finite")

    def clear(self) -> None:
        """Drop all tensors and shapes: the batch has changed."""
        self.store.clear()
        self.shapes.clear()

    def forget(self) -> None:
        """Drop all tensors and memories, even where the frames of an exception hold the run."""
        self.store.clear()
        self.memories.clear()

    def _discard(self, slot: Slot, branches: Branches, step: int, why: str) -> None:
        self.record.discarded.append((self.assignments[slot[0]].policy.name, step, why))
        if not branches:
            self._lost.add(slot)

    def _agree(self, good: bool) -> bool:
        return self.vote(Action.REUSE if good else Action.STORE) is Action.REUSE
