"""Records of runs: what was done, as numbers and shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cachekit.interface.adapter import Layout
from cachekit.interface.moment import Action, Time
from cachekit.planning.row import Row


class CallRecord(NamedTuple):
    """What the cost of one denoiser call depends on."""

    #: Name of the denoiser, "" for a bare one.
    denoiser: str
    #: Guidance branch that the call is for; "" for all that its batch holds.
    branch: str
    batch: int
    #: What was done, with misses and the outcome of probes.
    row: Row
    #: Whether the denoiser didn't run, as the call was for a branch that another one replaced.
    dropped: bool = False
    #: Whether it didn't run because its output was predicted.
    left_out: bool = False

    @property
    def inputs(self) -> tuple[str, str, int]:
        """Key of the shapes of the call's arguments."""
        return (self.denoiser, self.branch, self.batch)

    @property
    def signature(self) -> tuple[object, ...]:
        """Key of the call's cost."""
        return (*self.inputs, self.dropped, self.left_out, self.row.signature)


@dataclass
class Record:
    """What was done in one run. Its tensors have shapes but no values."""

    #: Steps that the run was planned for; `rows` are those that it reached.
    steps: int
    layout: Layout
    #: Whether the run began and ended with a pipeline's call, instead of being recognised by its timesteps.
    exact: bool
    rows: list[Row] = field(default_factory=list)
    calls: list[CallRecord] = field(default_factory=list)
    #: How often each action happened, and how often a reuse found nothing kept, by assignment.
    counts: list[dict[Action, int]] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)
    #: Policy, step and reason of each output that should have been kept and wasn't.
    discarded: list[tuple[str, int, str]] = field(default_factory=list)
    #: The policies that predicted something of the first output of the denoiser with NaN or inf, and its step.
    not_finite: tuple[list[str], int] | None = None
    #: What `max_cache_bytes` left of the plan.
    fit: Fit | None = None
    peak_bytes: int = 0
    #: Most bytes of tensors that policies held at once in `Moment.memory` and `Moment.shared`.
    memory_bytes: int = 0
    #: Seconds from the beginning of the run to its end, or to that of its last call if it isn't known to have ended.
    seconds: float = 0.0
    #: Seconds spent in reading arguments, finding steps, composing rows, recording and observing.
    deciding_seconds: float = 0.0
    #: What runs have in common that are compared by their time: pipeline, shapes, steps, device.
    timing_key: tuple[Any, ...] = ()
    #: ControlNet calls that skipped outputs which the denoiser wouldn't have read.
    shortened: int = 0
    #: What observing policies recorded, by name of the policy.
    traces: dict[str, list[Any]] = field(default_factory=dict)
    #: Arguments `(args, kwargs)` of calls by `CallRecord.inputs`: shapes alone.
    inputs: dict[tuple[str, str, int], tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    #: The steps' places in the scheduler's table, where there is one.
    times: tuple[Time, ...] = ()
    #: Whether an exception or `remove` ended the run.
    interrupted: bool = False
    #: Numbers and texts among the arguments of the pipeline's call.
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def guided(self) -> bool:
        """Whether the run had several guidance branches."""
        return len(self.layout.order) > 1


@dataclass(frozen=True)
class Fit:
    """Assignments that a limit on bytes leaves uncached."""

    #: Indices of the assignments that are computed throughout.
    dropped: frozenset[int] = frozenset()
    #: Peak of bytes that the run would keep without dropping any, 0 without a limit.
    needed: int = 0


@dataclass(frozen=True)
class Cost:
    """MACs of Linear and convolution layers, over all calls and branches of a run."""

    macs: int
    #: MACs of the same calls without policies.
    baseline_macs: int
    per_call: tuple[int, ...]

    @property
    def mac_reduction(self) -> float:
        """MACs without the policies, over MACs with them."""
        return self.baseline_macs / self.macs if self.macs else 1.0
