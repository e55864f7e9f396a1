"""How long uncached runs took, to compare cached ones with."""

from __future__ import annotations

from typing import Any

from cachekit.runs.record import Record

#: Most kinds of runs that are remembered.
_MOST = 64


class UncachedTimes:
    """The least seconds of whole runs without policies, by what their times depend on."""

    def __init__(self) -> None:
        """Start without a run."""
        self._seconds: dict[tuple[Any, ...], float] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> UncachedTimes:
        """Start anew: a copied model may be elsewhere."""
        return UncachedTimes()

    def note(self, record: Record) -> None:
        """Remember an uncached run, if a pipeline's call bounds it and it reached its last step."""
        if not record.exact or len(record.rows) < record.steps:
            return
        if len(self._seconds) >= _MOST:
            self._seconds.pop(next(iter(self._seconds)), None)
        known = self._seconds.get(record.timing_key, record.seconds)
        self._seconds[record.timing_key] = min(record.seconds, known)

    def like(self, record: Record) -> float | None:
        """Find the seconds of the fastest uncached run like this one; None where there was none."""
        return self._seconds.get(record.timing_key)
