"""What is known of a run when it begins, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cachekit.interface.adapter import Layout
    from cachekit.interface.moment import Time
    from cachekit.interface.sites import Branches


class Beginning(NamedTuple):
    """What a run begins with, for stand-ins whose numbers hold for one model, scheduler or length of the loop alone.

    `denoiser` is the module, and `scheduler` the pipeline's, or None. `arguments` are those of the pipeline's call by
    name, defaults included, and empty in a bare loop. `times` has the steps' places in the scheduler's table, or is
    empty. `full` lists the 0-based steps in which the plan computes the target, and `schedule` is the spec of the
    choice's own. `sample` is the shape of what the denoiser receives, `(branches * batch, channels, ...)`. `guided` is
    whether the run is known to have several branches; where only its second call would show that, it is False.
    `branches` are those that run in each step by the plan; a decision in the run, or the pipeline, may still end some.

        class Damped(StandIn):
            def begin(self, run: Beginning, shared: dict[str, Any]) -> None:
                if run.steps != len(WEIGHTS):
                    raise CalibrationError(f"damped has no weights for {run.steps} steps; run {len(WEIGHTS)}")
                shared["weights"] = WEIGHTS
    """

    denoiser: Any
    scheduler: Any
    arguments: Mapping[str, Any]
    steps: int
    times: tuple[Time, ...]
    layout: Layout
    schedule: str
    full: tuple[int, ...]
    sample: tuple[int, ...] = ()
    guided: bool = False
    branches: tuple[Branches, ...] = ()
