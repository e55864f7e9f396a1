"""Keep tensors for later steps of one run, keyed by assignment and branches."""

from __future__ import annotations

from typing import Any

import torch

from .policy import BranchChange
from .sites import Branches
from .tree import size_in_bytes, tree_map

#: An assignment's index, and the ordinal of the call within its step: calls never read each other's.
Slot = tuple[int, int]


class Store:
    """Hold what the policies of one run keep; nothing is ever shared between runs, branches or shapes.

    What a guidance policy keeps of all branches together has the key of no branches, `()`.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._entries: dict[tuple[Slot, Branches], Any] = {}
        self._bytes: dict[tuple[Slot, Branches], int] = {}
        self.bytes = 0
        self.peak_bytes = 0

    def get(self, slot: Slot, branches: Branches) -> Any:
        """Return what `slot` keeps for exactly these branches, or None."""
        return self._entries.get((slot, branches))

    def put(self, slot: Slot, branches: Branches, kept: Any) -> None:
        """Keep, in place of what was kept for these branches before."""
        self.drop(slot, branches)
        self._entries[slot, branches] = kept
        self._bytes[slot, branches] = size_in_bytes(kept)
        self.bytes += self._bytes[slot, branches]
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def clear(self) -> None:
        """Forget everything kept; the peak stays."""
        for key in list(self._entries):
            self.drop(*key)

    def change_branches(self, branches: Branches, changes: list[BranchChange]) -> None:
        """Turn everything kept into what the remaining `branches` need, each by its policy's rule."""
        kept_for: dict[Slot, set[Branches]] = {}
        for slot, named in self._entries:
            if named:
                kept_for.setdefault(slot, set()).add(named)
        for slot, present in kept_for.items():
            together = {named for named in present if len(named) > 1}
            if present == {branches} or (branches in present and together):
                # Kept in the form of these branches already, and never older than that of all.
                for named in together:
                    self.drop(slot, named)
                continue
            narrowed = narrow_kept(self._take(slot, present), branches, changes[slot[0]])
            if narrowed is not None:
                self.put(slot, branches, narrowed)

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
            self.bytes -= self._bytes.pop((slot, branches))


def split_kept(kept: Any, branches: Branches) -> dict[str, Any]:
    """Return what is kept of each branch, from tensors `(branches * batch, ...)`."""
    if len(branches) == 1:
        return {branches[0]: kept}
    return {
        branch: tree_map(lambda tensor, i=place: tensor.chunk(len(branches))[i], kept)  # type: ignore[misc]
        for place, branch in enumerate(branches)
    }


def narrow_kept(parts: dict[str, Any], branches: Branches, change: BranchChange) -> Any:
    """Return what stays of `parts` (branch -> kept) when only `branches` run on, or None for nothing."""
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
