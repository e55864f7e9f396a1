"""The beginning of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cachekit.interface.adapter import Layout
from cachekit.interface.moment import Time
from cachekit.runs.denoiser import Denoiser
from cachekit.tensors import tensors


@dataclass(frozen=True)
class RunStart:
    """What the first call of a run shows: its arguments by name, its batch, the run's length and its times."""

    denoiser: Denoiser
    arguments: dict[str, Any]
    batch: int
    layout: Layout
    steps: int
    times: tuple[Time, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """What the bytes that the run keeps depend on."""
        given = sorted(self.arguments.items())
        shapes = tuple((name, *((it.shape, it.dtype) for it in tensors(value))) for name, value in given)
        return (self.denoiser.name, shapes, self.batch, self.layout, self.steps, self.times)
