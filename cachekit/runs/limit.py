"""The limit on what runs keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cachekit.errors import BudgetError, first_line
from cachekit.runs.store import Store


@dataclass(frozen=True)
class Limit:
    """Most bytes kept at once, None without a limit, and the device that holds them, None for that of each tensor."""

    max_bytes: int | None = None
    device: torch.device | None = None

    @classmethod
    def of(cls, max_cache_bytes: int | None, cache_device: Any) -> Limit:
        """Check the limit that `apply` was given.

        Raises `BudgetError` unless they are a positive number of bytes and a device of this machine.
        """
        whole = isinstance(max_cache_bytes, int) and not isinstance(max_cache_bytes, bool)
        if max_cache_bytes is not None and not (whole and max_cache_bytes > 0):
            raise BudgetError(f"max_cache_bytes={max_cache_bytes!r}: give a whole number of at least 1")
        if cache_device is None:
            return cls(max_cache_bytes)
        try:
            return cls(max_cache_bytes, torch.empty(0, device=cache_device).device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise BudgetError(
                f"cache_device={cache_device!r}: {first_line(error)}; give a device of this machine"
            ) from error

    def store(self) -> Store:
        """Make the store of one run."""
        return Store(self.max_bytes, self.device)


NO_LIMIT = Limit()
