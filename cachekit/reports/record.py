"""What a run leaves behind: numbers and shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cachekit.interface.adapter import Layout
from cachekit.interface.policy import Action
from cachekit.planning.row import Row


@dataclass(frozen=True)
class CallRecord:
    """Say of one call what its cost depends on.

    `branch` is the branch that the call is for, or empty for all that the batch holds. `row` is what really
    happened in it, misses and probes included; a call that was `dropped` did not run at all.
    """

    denoiser: str
    branch: str
    batch: int
    row: Row
    dropped: bool = False

    @property
    def inputs(self) -> tuple[str, str, int]:
        """Return what the shapes of the call's arguments depend on."""
        return (self.denoiser, self.branch, self.batch)

    @property
    def signature(self) -> tuple[object, ...]:
        """Return what makes two calls cost the same."""
        return (*self.inputs, self.dropped, self.row.signature)


@dataclass
class Record:
    """Hold what a run leaves behind: numbers and shapes, no tensors with values.

    `rows` are the steps as planned or decided; `calls` what was done in each call; `inputs` holds the shapes of
    the arguments of calls, by `CallRecord.inputs`; `discarded` the policy, the step and the reason of each output that
    was not kept although it should have been; `shortened` counts a ControlNet's calls that left out what would
    be thrown away; `fit` what a budget left of the plan.
    """

    steps: int
    layout: Layout
    exact: bool
    rows: list[Row] = field(default_factory=list)
    calls: list[CallRecord] = field(default_factory=list)
    counts: list[dict[Action, int]] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)
    discarded: list[tuple[str, int, str]] = field(default_factory=list)
    fit: Fit | None = None
    peak_bytes: int = 0
    deciding_seconds: float = 0.0
    shortened: int = 0
    traces: dict[str, list[Any]] = field(default_factory=dict)
    inputs: dict[tuple[str, str, int], tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    interrupted: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def guided(self) -> bool:
        """Tell whether the run had branches to choose from."""
        return len(self.layout.order) > 1


@dataclass(frozen=True)
class Fit:
    """Say what fits: the `dropped` assignments are computed throughout; with them `needed` bytes would be kept."""

    dropped: frozenset[int] = frozenset()
    needed: int = 0


@dataclass(frozen=True)
class Cost:
    """Hold multiply-accumulates of Linear and convolution layers over all calls and branches of a run."""

    macs: int
    baseline_macs: int
    per_call: tuple[int, ...]

    @property
    def speedup(self) -> float:
        """Return how many times fewer there are than uncached."""
        return self.baseline_macs / self.macs if self.macs else 1.0
