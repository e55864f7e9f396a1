"""One policy on one model: runs of it, and what they are compared with."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from cachekit.applying import apply
from cachekit.attaching.attachment import Attachment
from cachekit.errors import GuidanceError, SiteError
from cachekit.interface.moment import OPEN, Action
from cachekit.interface.policy import Policy
from cachekit.planning.plan import Plan
from cachekit.registry.catalog import Catalog
from cachekit.runs.report import Report
from cachekit.testing.models import MODELS, Call, never_attached, pipeline, uncached
from cachekit.testing.places import first_module, traced
from cachekit.testing.results import CheckFailedError
from cachekit.testing.spies import Prediction, Recorder, watched
from cachekit.testing.tiny.calls import drawn

#: Lengths of runs: the first in which the plan reuses something is taken.
_STEPS = (6, 12, 25)


class CachedRun(NamedTuple):
    """A cached run: its latents, what its stand-ins made, tensors that were written to, and its report."""

    image: torch.Tensor
    predictions: Sequence[Prediction]
    writes: Sequence[str]
    report: Report


class Subject:
    """Policies on one model."""

    def __init__(self, policies: tuple[Policy, ...], model: str, catalog: Catalog) -> None:
        """Prepare; nothing is built before it is needed."""
        self.policies = policies
        self.model = MODELS[model]
        self.catalog = catalog
        self._recorder = Recorder()
        self._watched = tuple(watched(policy, self._recorder) for policy in policies)

    @property
    def spec(self) -> str:
        """The specs, joined."""
        return "+".join(map(str, self.policies))

    @property
    def pipe(self) -> Any:
        """The pipeline, which nothing is attached to between checks."""
        return pipeline(self.model.name)

    # -- applying -----------------------------------------------------------------------------------------

    @contextmanager
    def applied(
        self, pipe: Any = None, *, plain: bool = False, before: Sequence[Policy] = (), after: Sequence[Policy] = ()
    ) -> Iterator[Attachment]:
        """Apply the policies during the block, watched unless `plain`; others come `before` and `after` them."""
        policies = [*before, *(self.policies if plain else self._watched), *after]
        with apply(self.pipe if pipe is None else pipe, policies, catalog=self.catalog) as attachment:
            yield attachment

    def draw(
        self, attachment: Attachment, call: Call, pipe: Any = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> CachedRun:
        """Run the pipeline that the policies are applied to."""
        self._recorder.predictions, self._recorder.writes = [], []
        used = self.pipe if pipe is None else pipe
        image = drawn(used, {**call.arguments(self.model, used, dtype), **changes})
        return CachedRun(image, self._recorder.predictions, self._recorder.writes, attachment.report())

    def draw_fresh(self, call: Call) -> CachedRun:
        """Apply, run once and remove."""
        with self.applied() as attachment:
            return self.draw(attachment, call)

    def draw_removed(self, call: Call) -> torch.Tensor:
        """Run the pipeline after everything was removed."""
        return drawn(self.pipe, call.arguments(self.model, self.pipe))

    def uncached(self, call: Call) -> torch.Tensor:
        """Run a pipeline that nothing was ever applied to."""
        return uncached(self.model.name, call)

    def require_uncached(self, found: torch.Tensor, call: Call, what: str, pipe: Any = None) -> None:
        """Raise `CheckFailedError` unless latents equal those of a pipeline that nothing was ever applied to."""
        if not torch.equal(found, self.uncached(call)):
            where = self.parting(self.pipe if pipe is None else pipe, never_attached(self.model.name), call)
            raise CheckFailedError(f"{what} (by {far(found, self.uncached(call))}){where}")

    def parting(self, pipe: Any, other: Any, call: Call) -> str:
        """Draw with two pipelines as they are now, and name the first module that gives something else."""
        outputs = []
        for one in (pipe, other):
            with traced(one) as found:
                drawn(one, call.arguments(self.model, one))
            outputs.append(found)
        return first_module(*outputs)

    # -- the first run ------------------------------------------------------------------------------------

    @functools.cached_property
    def refusal(self) -> str:
        """Why the policies refuse this model, or ""."""
        try:
            with self.applied():
                pass
        except (SiteError, GuidanceError) as error:
            return str(error)
        except Exception:  # noqa: BLE001 - what else is wrong is for a check to report
            return ""
        return str(self.error) if isinstance(self.error, (SiteError, GuidanceError)) else ""

    @functools.cached_property
    def steps(self) -> int:
        """The number of steps of the runs."""
        with self.applied(plain=True) as attachment:
            return next((steps for steps in _STEPS if _may_reuse(self._plan(attachment, steps))), _STEPS[0])

    @property
    def call(self) -> Call:
        """The call that most checks make."""
        return Call(self.steps)

    @functools.cached_property
    def _first(self) -> CachedRun | Exception:
        self.uncached(self.call)  # before a policy can change a class, or torch, for all pipelines
        try:
            return self.draw_fresh(self.call)
        except Exception as error:  # noqa: BLE001 - whatever a policy raises is a result
            return error

    @property
    def error(self) -> Exception | None:
        """What the first run raised."""
        return self._first if isinstance(self._first, Exception) else None

    @property
    def first(self) -> CachedRun:
        """The first run of all, which later ones must equal; raises what it raised."""
        if isinstance(self._first, Exception):
            raise self._first
        return self._first

    @property
    def reuses(self) -> bool:
        """Whether the first run reused anything."""
        return any(count.reused for count in self.first.report.counts)

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan of the first run, by the timesteps that the pipeline gave its scheduler there."""
        with self.applied(plain=True) as attachment:
            if self.error is not None:
                return self._plan(attachment, self.steps)
            return attachment.setup.plan_of(self.steps, self.model.guided, self.first.report.record.times)

    def _plan(self, attachment: Attachment, steps: int) -> Plan:
        return attachment.plan(steps, guided=self.model.guided)

    @property
    def stand_ins(self) -> list[Prediction]:
        """The last prediction of each stand-in in the first run, when its history was longest."""
        return list({id(found.part): found for found in self.first.predictions}.values())


def _may_reuse(plan: Plan) -> bool:
    return any(action in (Action.REUSE, OPEN) for row in plan.rows for action in row.actions)


# -- comparing ------------------------------------------------------------------------------------------------


def require_same(found: CachedRun, expected: CachedRun, what: str) -> None:
    """Raise `CheckFailedError` unless two runs gave the same latents to the bit."""
    if not torch.equal(found.image, expected.image):
        raise CheckFailedError(f"{what} (by {far(found.image, expected.image)}){_first_difference(found, expected)}")


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Compute the norm of the difference over that of the second tensor; infinite for other shapes or NaN."""
    if found.shape != expected.shape:
        return float("inf")
    far = float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12))
    return far if far == far else float("inf")


def far(found: torch.Tensor, expected: torch.Tensor) -> str:
    """Write by how much latents differ, as a share of the norm, or their shapes."""
    if found.shape != expected.shape:
        return f"the shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    return f"{distance(found, expected):.2g} of its norm"


def _first_difference(found: CachedRun, expected: CachedRun) -> str:
    """Name the first stand-in that made something else."""
    for one, other in zip(found.predictions, expected.predictions):
        if one.place != other.place:
            return f"; first, {one.place} was predicted where {other.place} was before"
        if any(distance(left, right) for left, right in zip(one.made, other.made)):
            return f"; what was predicted differs first for {one.place}"
    return ""
