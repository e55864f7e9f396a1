"""What one run keeps for its later steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from math import isfinite
from typing import Any

from torch import Tensor

from cachekit.interface.moment import OPEN, Action, Entry
from cachekit.interface.parts import BranchChange
from cachekit.interface.sites import Branches
from cachekit.planning.assignments import Assignment
from cachekit.planning.row import Row
from cachekit.runs.memories import Memories
from cachekit.runs.record import Record
from cachekit.runs.store import Slot, Store
from cachekit.tensors import is_finite, read_together, sums

#: Agrees on an action with the other processes that share an image.
Voting = Callable[[Action], Action]


class Keeper:
    """The kept tensors of one run, the shapes and structures they come in, and the memories of policies.

    `shapes` are those of skipped modules' outputs by branch, one for all outputs that are alike, which `kinds` has by
    what they share; `templates` are outputs without elements, which kept tensors are put back into. `is_replayed` is
    whether the run only repeats what another has decided, without values.
    """

    def __init__(
        self, assignments: Sequence[Assignment], store: Store, vote: Voting, record: Record, is_replayed: bool = False
    ) -> None:
        """Keep in `store`, agree with other processes by `vote`, and count in `record`."""
        self.assignments = assignments
        self.store = store
        self.vote = vote
        self.record = record
        self.is_replayed = is_replayed
        self.memories = Memories()
        self.shapes: dict[tuple[Slot, str], dict[str, Any]] = {}
        self.kinds: dict[Hashable, Any] = {}
        self.templates: dict[Slot, Any] = {}
        #: Rows, denoisers and sums of outputs since the last report; whether one before them was not finite.
        self._outputs: list[tuple[Row, str, Tensor]] = []
        self._is_spoiled = False
        self._changes = [bound.choice.change for bound in assignments]

    def push(self, slot: Slot, branches: Branches, entry: Entry, last: Branches | None = None) -> None:
        """Keep what a call made before what earlier ones made; without room for it, later steps compute.

        `last` are the branches that will read it, where they are fewer.
        """
        what, change = self.assignments[slot[0]].choice.what, self._changes[slot[0]]
        if what.entries == 0:
            return
        if last is None:
            is_kept = self.store.push(slot, branches, entry, what.entries)
        else:
            is_kept = self.store.push_narrowed(slot, branches, entry, what.entries, last, change)
        if not is_kept:
            self._discard(slot, len(self.record.rows) - 1, "beyond max_cache_bytes")

    def enter(self, row: Row, before: Row | None) -> None:
        """Convert what is kept where a step's branches differ from those of the step before."""
        if before is not None and row.branches != before.branches:
            self.store.drop_all(set(self._restarted(row)))
            self.store.change_branches(row.branches, self._changes, before.branches)
            self.drop_not_finite(row.step)

    def _restarted(self, row: Row) -> Sequence[int]:
        """List the assignments that a change of branches has made start anew."""
        refreshed = (index for index, change in enumerate(self._changes) if change is BranchChange.REFRESH)
        return [index for index in refreshed if row.origins and row.origins[index] == row.step]

    def skip(self, row: Row) -> None:
        """Drop what an uncached step would have kept anew: later steps compute it."""
        self.store.drop_all({index for index, action in enumerate(row.actions) if action in (Action.STORE, OPEN)})

    def drop_not_finite(self, step: int) -> None:
        """Drop what was kept since the last check, in `step`, and holds NaN or inf; later steps compute it.

        Checked where it may be read next, not where it was kept: one device sync for all tensors of a call.
        """
        fresh = self.store.take_fresh()
        if not fresh:
            return
        good = is_finite([kept for *_, kept in fresh])
        if self._agree(all(good)):
            return
        for (slot, branches, _), is_good in zip(fresh, good):
            if not self._agree(is_good):
                self.store.drop_newest(slot, branches)
                self._discard(slot, step, "not finite")

    def note_output(self, row: Row, denoiser: str, output: Iterable[Tensor]) -> None:
        """Take note of whether a denoiser's output is finite; nothing is read, so that no call waits for it."""
        if self.assignments and not self.is_replayed:
            self._outputs += [(row, denoiser, total) for total in sums(output)]

    def find_not_finite(self) -> None:
        """Record the first output with NaN or inf, if a part of it was predicted: one device sync for all."""
        noted, self._outputs = self._outputs, []
        totals = read_together([total for *_, total in noted])
        bad = next(((row, denoiser) for (row, denoiser, _), total in zip(noted, totals) if not isfinite(total)), None)
        if bad is None or self._is_spoiled:
            return
        self._is_spoiled = True
        row, denoiser = bad
        acting = zip(self.assignments, row.actions)
        reused = [it.policy.name for it, action in acting if action is Action.REUSE and it.denoiser in ("", denoiser)]
        if reused:
            self.record.not_finite = (list(dict.fromkeys(reused)), row.step)

    def clear(self) -> None:
        """Drop all tensors and shapes: the batch has changed."""
        self.store.clear()
        self.shapes.clear()
        self.kinds.clear()

    def forget(self) -> None:
        """Drop all tensors and memories, even where the frames of an exception hold the run."""
        self.store.clear()
        self.memories.clear()
        self._outputs.clear()

    def _discard(self, slot: Slot, step: int, why: str) -> None:
        self.record.discarded.append((self.assignments[slot[0]].policy.name, step, why))

    def _agree(self, good: bool) -> bool:
        return self.vote(Action.REUSE if good else Action.STORE) is Action.REUSE
