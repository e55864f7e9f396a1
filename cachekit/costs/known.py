"""Count the multiply-accumulates of like runs once."""

from __future__ import annotations

from typing import Any

from cachekit.costs.replay import cost_of
from cachekit.driving.setup import Setup
from cachekit.errors import CostError
from cachekit.runs.record import Cost, Record

#: Most costs that are held: where policies decide during the run, each image may have another one.
_MOST = 256


class KnownCosts:
    """Counts the MACs of one pipeline's runs as `cost_of` does, once for all runs with the same shapes and actions.

    It outlives attachments; weights and modules must stay as they are.
    """

    def __init__(self) -> None:
        """Start without a run."""
        self._found: dict[tuple[Any, ...], Cost | str] = {}

    def __call__(self, setup: Setup, record: Record) -> Cost:
        """Count the MACs of a run; raises `CostError` where the denoiser doesn't run on the meta device."""
        specs = tuple(map(str, setup.policies))
        key = (record.timing_key, specs, *(call.signature for call in record.calls))
        if key not in self._found:
            if len(self._found) >= _MOST:
                self._found.pop(next(iter(self._found)))
            self._found[key] = _counted(setup, record)
        found = self._found[key]
        if isinstance(found, str):
            raise CostError(found)
        return found


def _counted(setup: Setup, record: Record) -> Cost | str:
    """Count the MACs of a run; the reason where they can't be counted."""
    try:
        return cost_of(setup, record)
    except CostError as error:
        return str(error)
