"""What policies remember during one run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from cachekit.interface.sites import Branches
from cachekit.tensors import tensors

Memory = dict[str, Any]


class Memories:
    """A memory for each policy, and one for each of its targets and the branches of a call.

    Branches that have calls of their own do not share the latter.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._of_policies: defaultdict[str, Memory] = defaultdict(dict)
        self._of_targets: defaultdict[tuple[int, Branches, int], Memory] = defaultdict(dict)
        self.peak_bytes = 0

    def of(self, policy: str) -> Memory:
        """Get the memory that all targets of a policy share."""
        return self._of_policies[policy]

    def of_target(self, index: int, branches: Branches, ordinal: int) -> Memory:
        """Get the memory of an assignment for like calls."""
        return self._of_targets[index, branches, ordinal]

    def traces(self) -> dict[str, list[Any]]:
        """Copy what policies recorded for the report, by name of the policy."""
        return {name: list(memory["trace"]) for name, memory in self._of_policies.items() if "trace" in memory}

    def measure(self) -> None:
        """Take note of the bytes of the tensors that policies hold now; those in traces are not counted."""
        if any(self._of_policies.values()) or any(self._of_targets.values()):
            used = (*self._of_policies.values(), *self._of_targets.values())
            sizes = {id(tensor): tensor.nbytes for memory in used for tensor in _held(memory)}
            self.peak_bytes = max(self.peak_bytes, sum(sizes.values()))

    def clear(self) -> None:
        """Forget everything."""
        self._of_policies.clear()
        self._of_targets.clear()


def _held(memory: Memory) -> Iterator[Tensor]:
    for key, value in memory.items():
        if key == "trace":
            continue
        if isinstance(value, Tensor):
            yield value
        elif not isinstance(value, (int, float)):
            yield from tensors(value)
