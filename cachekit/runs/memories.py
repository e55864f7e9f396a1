"""What policies remember during one run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cachekit.interface.sites import Branches

Memory = dict[str, Any]


class Memories:
    """A memory for each policy, and separate ones for its probes.

    Probes of branches that have calls of their own do not share a memory.
    """

    def __init__(self, policies: Iterable[str]) -> None:
        """Start empty, with a memory for each of these names."""
        self._of_policies: dict[str, Memory] = {name: {} for name in policies}
        self._of_probes: dict[tuple[str, str, Branches, int], Memory] = {}

    def of(self, policy: str) -> Memory:
        """Get a policy's memory."""
        return self._of_policies[policy]

    def of_probe(self, policy: str, denoiser: str, branches: Branches, ordinal: int) -> Memory:
        """Get the memory of a policy's probes in like calls."""
        return self._of_probes.setdefault((policy, denoiser, branches, ordinal), {})

    def traces(self) -> dict[str, list[Any]]:
        """Copy what policies recorded for the report, by name of the policy."""
        return {name: list(memory["trace"]) for name, memory in self._of_policies.items() if "trace" in memory}

    def clear(self) -> None:
        """Forget everything."""
        self._of_policies.clear()
        self._of_probes.clear()
