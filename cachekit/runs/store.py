"""Kept tensors of one run, as histories by assignment and branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from cachekit.interface.moment import Entry, History, Streams
from cachekit.interface.parts import BranchChange
from cachekit.interface.sites import Branches
from cachekit.tensors import size_in_bytes

#: An assignment's index, and the ordinal of the call within its step: calls never read each other's.
Slot = tuple[int, int]


class Store:
    """What the policies of one run keep; nothing is shared between runs, branches or shapes.

    Branches that always share a batch have one history. Once one of them is left out, each has its own, so that
    branches may come and go. What guidance keeps of all branches together has the key of no branches, `()`.
    """

    def __init__(self, max_bytes: int | None = None, device: torch.device | None = None) -> None:
        """Start empty; keep at most `max_bytes`, and on `device` where that is another than the tensors' own."""
        self.max_bytes = max_bytes
        self.device = device
        self._histories: dict[tuple[Slot, Branches], History] = {}
        self._homes: dict[tuple[Slot, Branches], list[torch.device]] = {}
        self._bytes: dict[tuple[Slot, Branches], int] = {}
        self._fresh: dict[tuple[Slot, Branches], None] = {}
        self.bytes = 0
        self.peak_bytes = 0

    def read(self, slot: Slot, branches: Branches) -> list[tuple[Branches, History]]:
        """Get the histories of these branches, on the devices they were made on: one for all, or one for each.

        The list is empty unless something is kept for every branch.
        """
        if (slot, branches) in self._histories:
            return [(branches, self._at_home(slot, branches))]
        singles = [(branch,) for branch in branches]
        if len(branches) < 2 or not all((slot, single) in self._histories for single in singles):
            return []
        return [(single, self._at_home(slot, single)) for single in singles]

    def has(self, slot: Slot, branches: Branches) -> bool:
        """Whether `slot` keeps anything for each of these branches."""
        if (slot, branches) in self._histories:
            return True
        return len(branches) > 1 and all((slot, (branch,)) in self._histories for branch in branches)

    def push(self, slot: Slot, branches: Branches, entry: Entry, length: int | None) -> bool:
        """Keep an entry before those kept already, at most `length` of them; False where there is no room."""
        if len(branches) > 1 and any((slot, (branch,)) in self._histories for branch in branches):
            divided = split((entry,), branches)
            kept = [self.push(slot, (branch,), divided[branch][0], length) for branch in branches]
            return all(kept)
        before = self._histories.get((slot, branches), ())
        if self.device is not None:
            self._homes[slot, branches] = [tensor.device for tensor in entry.tensors]
            entry = entry._replace(tensors=_moved(entry.tensors, [self.device] * len(entry.tensors)))
        history = (entry, *before) if length is None else (entry, *before[: length - 1])
        return self._set(slot, branches, history, is_fresh=True)

    def push_narrowed(
        self, slot: Slot, branches: Branches, entry: Entry, length: int | None, last: Branches, change: BranchChange
    ) -> bool:
        """Keep, of an entry made for all these branches, what the `last` of them will read."""
        if (slot, branches) in self._histories:
            self.take_apart(slot, branches, last, change)
        divided = split((entry,), branches)
        kept = dict.fromkeys(last, mean(divided)) if change is BranchChange.MEAN else divided
        pushed = [self.push(slot, (branch,), kept[branch][0], length) for branch in last]
        return all(pushed)

    def sizes(self) -> dict[int, int]:
        """Sum the bytes that each assignment keeps now."""
        sizes: dict[int, int] = {}
        for (slot, _), size in self._bytes.items():
            sizes[slot[0]] = sizes.get(slot[0], 0) + size
        return sizes

    def count(self, index: int) -> int:
        """Count the entries of an assignment's longest history."""
        return max((len(kept) for (slot, _), kept in self._histories.items() if slot[0] == index), default=0)

    def take_fresh(self) -> list[tuple[Slot, Branches, Streams]]:
        """List the tensors that have been kept since this was last called, on the device that holds them."""
        fresh, self._fresh = self._fresh, {}
        return [(*key, self._histories[key][0].tensors) for key in fresh]

    # -- dropping -----------------------------------------------------------------------------------------

    def drop_all(self, indices: Set[int]) -> None:
        """Forget what these assignments keep."""
        for slot, branches in list(self._histories) if indices else ():
            if slot[0] in indices:
                self.drop(slot, branches)

    def drop_read(self, ended: Set[tuple[int, str]]) -> None:
        """Forget what assignments keep of branches that nothing reads any more: pairs of index and branch."""
        for slot, branches in list(self._histories) if ended else ():
            if branches and all((slot[0], branch) in ended for branch in branches):
                self.drop(slot, branches)

    def drop_newest(self, slot: Slot, branches: Branches) -> None:
        """Forget the newest entry of a history."""
        history = self._histories[slot, branches][1:]
        if history:
            self._set(slot, branches, history)
        else:
            self.drop(slot, branches)

    def drop(self, slot: Slot, branches: Branches) -> None:
        """Forget what `slot` keeps for exactly these branches, if anything."""
        if (slot, branches) in self._histories:
            del self._histories[slot, branches]
            self._fresh.pop((slot, branches), None)
            self._homes.pop((slot, branches), None)
            self.bytes -= self._bytes.pop((slot, branches))

    def clear(self) -> None:
        """Forget everything kept; the peak stays."""
        for key in list(self._histories):
            self.drop(*key)

    # -- branches -----------------------------------------------------------------------------------------

    def change_branches(self, branches: Branches, changes: Sequence[BranchChange], before: Branches) -> None:
        """Convert what is kept for the branches until now to what the present `branches` read."""
        for slot in {slot for slot, named in self._histories if named and {*named} <= {*before, *branches}}:
            if changes[slot[0]] is BranchChange.MEAN:
                self._take_mean(slot, branches, before)
            elif len(before) > 1 and (slot, before) in self._histories:
                self.take_apart(slot, before, before)

    def _take_mean(self, slot: Slot, branches: Branches, before: Branches) -> None:
        if len(branches) > len(before):  # a mean stands for no single branch
            self.drop(slot, before)
        elif len(before) > 1 and (slot, before) in self._histories:
            self.take_apart(slot, before, branches, BranchChange.MEAN)
        elif len(before) > 1 and len(branches) == 1 and all((slot, (branch,)) in self._histories for branch in before):
            divided = {branch: self._histories[slot, (branch,)] for branch in before}
            for branch in before:
                if (branch,) != branches:
                    self.drop(slot, (branch,))
            self._set(slot, branches, mean(divided), is_fresh=True)

    def take_apart(
        self, slot: Slot, joint: Branches, wanted: Branches, change: BranchChange = BranchChange.REMAINING
    ) -> None:
        """Replace a history of several branches by one for each wanted branch, or by their mean for it."""
        history, is_fresh = self._histories[slot, joint], (slot, joint) in self._fresh
        homes = self._homes.get((slot, joint))
        divided = split(history, joint)
        self.drop(slot, joint)
        for branch in wanted:
            kept = mean(divided) if change is BranchChange.MEAN else divided[branch]
            self._set(slot, (branch,), kept, is_fresh or change is BranchChange.MEAN)
            if homes is not None:
                self._homes[slot, (branch,)] = homes

    def _set(self, slot: Slot, branches: Branches, history: History, is_fresh: bool = False) -> bool:
        key = (slot, branches)
        size = sum(size_in_bytes(entry.tensors) for entry in history)
        total = self.bytes - self._bytes.get(key, 0) + size
        if self.max_bytes is not None and total > self.max_bytes:
            self.drop(slot, branches)
            return False
        self._histories[key], self._bytes[key] = history, size
        if is_fresh:
            self._fresh[key] = None
        self.bytes = total
        self.peak_bytes = max(self.peak_bytes, total)
        return True

    def _at_home(self, slot: Slot, branches: Branches) -> History:
        history = self._histories[slot, branches]
        if self.device is None:
            return history
        homes = self._homes[slot, branches]
        return tuple(entry._replace(tensors=_moved(entry.tensors, homes)) for entry in history)


def split(history: History, branches: Branches) -> dict[str, History]:
    """Split tensors `(branches * batch, ...)` by branch; each part has memory of its own."""
    return {
        branch: tuple(
            entry._replace(tensors=tuple(tensor.chunk(len(branches))[place].clone() for tensor in entry.tensors))
            for entry in history
        )
        for place, branch in enumerate(branches)
    }


def mean(divided: Mapping[str, History]) -> History:
    """Compute the mean over branches of each entry."""
    return tuple(
        entries[0]._replace(tensors=tuple(map(_mean, zip(*(entry.tensors for entry in entries)))))
        for entries in zip(*divided.values())
    )


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total / len(tensors)


def _moved(tensors: Streams, devices: Sequence[torch.device]) -> Streams:
    return tuple(tensor.to(device) for tensor, device in zip(tensors, devices))
