"""What a run would do and cost: its plan and its estimate, before anything runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cachekit.costs.estimate import Estimate, Estimator
from cachekit.driving.setup import Setup
from cachekit.interface.specs import Spec, parse_all
from cachekit.models.architectures import architecture, guided_by_default
from cachekit.models.demo import DEMO_GUIDANCE, demo_steps, heldout_captions
from cachekit.models.loading import class_of, default_scale, default_steps, pipeline_from_config
from cachekit.models.names import DEMOS, is_architecture
from cachekit.planning.plan import Plan
from cachekit.registry.catalog import Catalog
from cachekit.upstream.pipelines import denoisers_of
from cachekit.upstream.prediction import planned_times

__all__ = ["Defaults", "Outline", "Preview"]

_STEPS = 25


@dataclass(frozen=True)
class Defaults:
    """How a model is run unless something else is chosen; `guidance` is None where the pipeline decides.

    `guided` is whether its runs have two guidance branches.
    """

    steps: int
    guidance: float | None
    guided: bool
    prompt: str


@dataclass(frozen=True)
class Preview:
    """The plan of a run, and its cost."""

    plan: Plan
    estimate: Estimate


class Outline:
    """A model as its configuration describes it; weights are loaded of the embedded models alone.

    `model` is the name of an architecture, a folder, a hub id, or an embedded model. Raises `ModelError` where there is
    no such model.
    """

    def __init__(self, model: str, catalog: Catalog) -> None:
        """Read the configuration of `model`."""
        self.model = model
        self._catalog = catalog
        #: Whether there is something to draw with.
        self.has_weights = not is_architecture(model)
        self._pipe: Any = pipeline_from_config(model) if self.has_weights else architecture(model).build()
        self._denoisers = denoisers_of(self._pipe)
        self._estimators: dict[bool, Estimator] = {}

    @property
    def title(self) -> str:
        """The model's pipeline or denoiser, and the number of its parameters."""
        count = sum(parameter.numel() for module in self._denoisers.values() for parameter in module.parameters())
        names = " and ".join(type(module).__name__ for module in self._denoisers.values())
        return f"{names}, {count:,} parameters"

    @functools.cached_property
    def defaults(self) -> Defaults:
        """How the model is run unless something else is chosen."""
        guided = guided_by_default(self._pipe if self.has_weights else self.model)
        if self.model in DEMOS:
            return Defaults(demo_steps(self.model), DEMO_GUIDANCE, guided, prompt=heldout_captions(1)[0])
        if not self.has_weights:
            return Defaults(architecture(self.model).steps, None, guided, prompt="")
        kind = class_of(self._pipe)
        steps, scale = (default_steps(kind), default_scale(kind)) if kind else (None, None)
        return Defaults(steps or _STEPS, scale, guided, prompt="a photograph of a lighthouse")

    def preview(self, specs: Spec | Sequence[Spec], steps: int, guided: bool) -> Preview:
        """Plan and estimate a run; raises a `CachekitError` as `apply` and `estimate` do."""
        policies = parse_all(specs, self._catalog)
        iterations, times = planned_times(self._pipe, steps)
        plan = Setup.of(self._denoisers, policies, self._catalog).plan_of(iterations, guided, times)
        return Preview(plan, self._estimator(guided)(policies, steps))

    def _estimator(self, guided: bool) -> Estimator:
        if guided not in self._estimators:
            subject = self._pipe if self.has_weights else self.model
            self._estimators[guided] = Estimator.of(subject, guided=guided, catalog=self._catalog)
        return self._estimators[guided]
