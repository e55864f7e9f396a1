"""What happens at a target in a step, and what the parts of a policy can see of that step."""

from __future__ import annotations

from enum import Enum
from math import inf, log
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cachekit.interface.sites import Branches, Kind, Target

if TYPE_CHECKING:
    from torch import Tensor

#: The tensors that flow through a module or region, in order: hidden states, and text states beside them.
Streams = tuple["Tensor", ...]
#: A memory of the plan, which nothing can be written into.
_EMPTY: Any = MappingProxyType({})


class Action(str, Enum):
    """What happens at a target in one step.

    `COMPUTE` runs it and keeps nothing, `STORE` runs it and keeps its output, `REUSE` skips it and returns what a
    stand-in makes of the outputs kept before. A `REUSE` for which nothing is kept computes, and is counted as a miss.
    """

    COMPUTE = "compute"
    STORE = "store"
    REUSE = "reuse"


class Open(Enum):
    """The type of `OPEN`, which is its only value."""

    OPEN = "open"


#: Returned by `Schedule.action` to leave the decision to the run: to `decide`, or to the signals of an `Indicator`.
OPEN: Final = Open.OPEN


class Time(NamedTuple):
    """A step of a run, and where the scheduler is in it.

    The sample that the denoiser receives is `alpha * x0 + sigma * noise`; both are None, like `timestep`, where no
    scheduler gives them. `kind` is what the denoiser predicts: "epsilon", "v_prediction", "sample" or "flow".

    >>> round(Time(step=3, timestep=781.0, sigma=0.8, alpha=0.6, kind="epsilon").log_snr, 3)
    -0.288
    """

    step: int
    timestep: float | None = None
    sigma: float | None = None
    alpha: float | None = None
    kind: str = ""

    @property
    def log_snr(self) -> float | None:
        """The logarithm of alpha over sigma; None where they are unknown.

        Minus infinity in pure noise, where alpha is 0, as in the first step of a flow, and infinity where sigma is.
        """
        if self.alpha is None or self.sigma is None or not (self.alpha or self.sigma):
            return None
        return log(self.alpha / self.sigma) if self.alpha and self.sigma else -inf if self.sigma else inf


class Entry(NamedTuple):
    """Tensors `(branches * batch, ...)` kept of one step, and that step."""

    tensors: Streams
    at: Time


#: What is kept of a target, the newest entry first.
History = tuple[Entry, ...]


class Moment(NamedTuple):
    """The step and the target for which a part of a policy is asked.

    `step` is the 0-based iteration of the pipeline's loop and `steps` the number of iterations. `origin` is the step
    at which this policy's schedule last started anew: 0, or later after a change of branches or a full step that
    another policy made necessary. `time` has the step's place in the scheduler's table.

    `branches` are those of the call, and `branch` is the only one of them, or "". Both are empty in a plan. `memory`
    is a dict of the run for this target and these branches, `shared` one for all targets of the policy; a list under
    `shared["trace"]` is shown in the report. Tensors in them are counted in `Report.memory_bytes`, not as kept for
    reuse. A plan has empty ones that cannot be written.

    >>> at = Moment(step=3, steps=25, time=Time(3, 781.0, 0.8, 0.6))
    >>> at.timestep, at.sigma, at.alpha, at.origin
    (781.0, 0.8, 0.6, 0)
    """

    step: int
    steps: int
    origin: int = 0
    time: Time = Time(0)
    target: Target | None = None
    branches: Branches = ()
    memory: dict[str, Any] = _EMPTY
    shared: dict[str, Any] = _EMPTY

    @property
    def kind(self) -> Kind | None:
        """The kind of the target; None without one.

        A schedule that looks at this alone is asked once for all targets of a kind, when a plan is made.
        """
        return self.target.kind if self.target is not None else None

    @property
    def branch(self) -> str:
        """The branch of the call, where it has a single one."""
        return self.branches[0] if len(self.branches) == 1 else ""

    @property
    def timestep(self) -> float | None:
        """The scheduler's timestep, or None."""
        return self.time.timestep

    @property
    def sigma(self) -> float | None:
        """The share of noise in the denoiser's sample, or None."""
        return self.time.sigma

    @property
    def alpha(self) -> float | None:
        """The share of x0 in the denoiser's sample, or None."""
        return self.time.alpha
