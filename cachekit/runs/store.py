"""Kept tensors of one run, by assignment and branches."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch

from cachekit.interface.policy import BranchChange
from cachekit.interface.sites import Branches
from cachekit.tensors import size_in_bytes, tensors, tree_map

#: An assignment's index, and the ordinal of the call within its step: calls never read each other's.
Slot = tuple[int, int]


class Store:
    """What the policies of one run keep; nothing is shared between runs, branches or shapes.

    What a guidance policy keeps of all branches together has the key of no branches, `()`.
    """

    def __init__(self, max_bytes: int | None = None, device: torch.device | None = None) -> None:
        """Start empty; keep at most `max_bytes`, and on `device` where that is another than the tensors' own."""
        self.max_bytes = max_bytes
        self.device = device
        self._homes: dict[tuple[Slot, Branches], list[torch.device]] = {}
        self._entries: dict[tuple[Slot, Branches], Any] = {}
        self._bytes: dict[tuple[Slot, Branches], int] = {}
        self._fresh: dict[tuple[Slot, Branches], None] = {}
        self.bytes = 0
        self.peak_bytes = 0

    def get(self, slot: Slot, branches: Branches) -> Any:
        """Get what `slot` keeps for exactly these branches, on the device it was made on, or None."""
        kept = self._entries.get((slot, branches))
        return kept if self.device is None else _moved(kept, self._homes.get((slot, branches), []))

    def has(self, slot: Slot, branches: Branches) -> bool:
        """Whether `slot` keeps anything for exactly these branches."""
        return self._entries.get((slot, branches)) is not None

    def put(self, slot: Slot, branches: Branches, kept: Any) -> bool:
        """Keep, in place of what was kept for these branches before; False where there is no room."""
        self.drop(slot, branches)
        size = size_in_bytes(kept)
        if self.max_bytes is not None and self.bytes + size > self.max_bytes:
            return False
        if self.device is not None:
            homes = [tensor.device for tensor in tensors(kept)]
            self._homes[slot, branches], kept = homes, _moved(kept, [self.device] * len(homes))
        self._entries[slot, branches] = kept
        self._fresh[slot, branches] = None
        self._bytes[slot, branches] = size
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return True

    def sizes(self) -> dict[int, int]:
        """Sum the bytes that each assignment keeps now."""
        sizes: dict[int, int] = {}
        for (slot, _), size in self._bytes.items():
            sizes[slot[0]] = sizes.get(slot[0], 0) + size
        return sizes

    def take_fresh(self) -> list[tuple[Slot, Branches, Any]]:
        """List what has been kept since this was last called, on the device that holds it."""
        fresh, self._fresh = self._fresh, {}
        return [(slot, branches, self._entries[slot, branches]) for slot, branches in fresh]

    def drop_all(self, indices: Set[int]) -> None:
        """Forget what these assignments keep."""
        for slot, branches in list(self._entries) if indices else ():
            if slot[0] in indices:
                self.drop(slot, branches)

    def clear(self) -> None:
        """Forget everything kept; the peak stays."""
        for key in list(self._entries):
            self.drop(*key)

    def change_branches(self, branches: Branches, changes: list[BranchChange], before: Branches | None = None) -> None:
        """Convert what is kept to what the remaining `branches` need, each by its policy's rule.

        `before` are the branches until now: if given, what calls for other branches have kept is left as it is.
        """
        kept_for: dict[Slot, set[Branches]] = {}
        for slot, named in self._entries:
            if named and (before is None or {*named} <= {*before, *branches}):
                kept_for.setdefault(slot, set()).add(named)
        for slot, present in kept_for.items():
            together = {named for named in present if len(named) > 1}
            if present == {branches} or (branches in present and together):
                # Kept in the form of these branches already, and never older than that of all.
                for named in together:
                    self.drop(slot, named)
                continue
            homes = next((self._homes[slot, named] for named in present if (slot, named) in self._homes), [])
            narrowed = narrow_kept(self._take(slot, present), branches, changes[slot[0]])
            if narrowed is not None:
                self.put(slot, branches, narrowed)
                self._homes.update({(slot, branches): homes} if homes else {})

    def _take(self, slot: Slot, present: set[Branches]) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        for named in present:
            parts.update(split_kept(self._entries[slot, named], named))
            self.drop(slot, named)
        return parts

    def drop(self, slot: Slot, branches: Branches) -> None:
        """Forget what `slot` keeps for exactly these branches, if anything."""
        if (slot, branches) in self._entries:
            del self._entries[slot, branches]
            self._fresh.pop((slot, branches), None)
            self._homes.pop((slot, branches), None)
            self.bytes -= self._bytes.pop((slot, branches))


def _moved(kept: Any, devices: list[torch.device]) -> Any:
    """Move the tensors of `kept`, in order, to these devices."""
    onto = iter(devices)
    return tree_map(lambda tensor: tensor.to(next(onto)), kept)


def split_kept(kept: Any, branches: Branches) -> dict[str, Any]:
    """Split tensors `(branches * batch, ...)` by branch."""
    if len(branches) == 1:
        return {branches[0]: kept}
    return {
        branch: tree_map(lambda tensor, i=place: tensor.chunk(len(branches))[i], kept)  # type: ignore[misc]
        for place, branch in enumerate(branches)
    }


def narrow_kept(parts: dict[str, Any], branches: Branches, change: BranchChange) -> Any:
    """Choose what stays of `parts`, by branch, when only `branches` run on; None for nothing."""
    if len(branches) != 1 or branches[0] not in parts or change is BranchChange.REFRESH:
        return None
    if change is BranchChange.MEAN:
        return _mean(list(parts.values()))
    # A slice would hold the memory of all branches.
    return tree_map(torch.clone, parts[branches[0]])


def _mean(parts: list[Any]) -> Any:
    if isinstance(parts[0], torch.Tensor):
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total / len(parts)
    if isinstance(parts[0], (tuple, list)):
        return type(parts[0])(_mean(list(group)) for group in zip(*parts))
    if isinstance(parts[0], dict):
        return {key: _mean([part[key] for part in parts]) for key in parts[0]}
    return parts[0]
