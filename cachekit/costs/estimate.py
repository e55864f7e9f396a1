"""Estimate what policies save on a model, without running it or loading its weights."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from cachekit.amounts import macs, size, table
from cachekit.costs.counting import Forward, Known, count_forward
from cachekit.costs.meta import meta_copy, on_meta
from cachekit.costs.replay import replay
from cachekit.driving.setup import Setup
from cachekit.interface.adapter import Layout
from cachekit.interface.moment import Action
from cachekit.interface.specs import Spec, parse_all
from cachekit.models.architectures import PIXELS_PER_LATENT, architecture, architecture_of, guided_by_default
from cachekit.models.loading import pipeline_from_config
from cachekit.models.names import is_architecture
from cachekit.planning.plan import Plan
from cachekit.planning.row import Row
from cachekit.registry.catalog import Catalog, installed
from cachekit.runs.record import CallRecord, Record
from cachekit.tensors import tree_map
from cachekit.upstream.pipelines import denoiser_of, pixels_per_latent
from cachekit.upstream.prediction import planned_times
from cachekit.upstream.weights import dtype_of


@dataclass(frozen=True)
class StepCost:
    """Cost of one step (0-based): how many branches run, and the MACs of all of them together."""

    step: int
    branches: int
    macs: int
    attention_macs: int


@dataclass(frozen=True)
class Estimate:
    """Cost of a run, per image, with and without the policies.

        found = cachekit.estimate("flux", "forecast:interval=3", num_inference_steps=28)
        print(found.mac_reduction, found.cache_bytes)

    Figures are of one image, over all steps and branches.
    """

    #: MACs of Linear and convolution layers.
    macs: int
    baseline_macs: int
    #: MACs of attention's products QK and AV, which `macs` leaves out.
    attention_macs: int
    baseline_attention_macs: int
    #: Parameters of the modules that still run in the final phase: from the last step that differs from all before it.
    params: int
    baseline_params: int
    #: Most bytes kept at once.
    cache_bytes: int
    steps: tuple[StepCost, ...]
    #: The table of actions that was counted.
    plan: Plan

    @property
    def mac_reduction(self) -> float:
        """MACs without the policies, over MACs with them."""
        return self.baseline_macs / self.macs

    @property
    def totals(self) -> list[tuple[str, str, str]]:
        """Rows of a table: a figure per image, uncached and with the policies, as text."""
        return [
            ("MACs of Linear and convolution layers", macs(self.baseline_macs), macs(self.macs)),
            ("MACs of attention products", macs(self.baseline_attention_macs), macs(self.attention_macs)),
            ("parameters in the final phase", f"{self.baseline_params:,}", f"{self.params:,}"),
            ("kept at peak", size(0), size(self.cache_bytes)),
        ]

    def __repr__(self) -> str:
        """Summarise the estimate in a line."""
        return f"<Estimate: {self._costs}, {size(self.cache_bytes)} kept, {len(self.steps)} steps>"

    @property
    def _costs(self) -> str:
        return f"{macs(self.macs)} of {macs(self.baseline_macs)}, {self.mac_reduction:.2f}x MAC reduction"

    def _repr_html_(self) -> str:
        """Write the totals as a table, for notebooks."""
        header = (f"{len(self.steps)} steps, {self.mac_reduction:.2f}x MAC reduction", "uncached", "cached")
        return table(self.totals, header)


def estimate(
    model: Any,
    specs: Spec | Iterable[Spec] = (),
    *,
    num_inference_steps: int = 25,
    height: int | None = None,
    width: int | None = None,
    inputs: dict[str, Any] | None = None,
    guided: bool | None = None,
    catalog: Catalog | None = None,
) -> Estimate:
    """Estimate the cost of a run: repeat its plan with the real engine on the meta device, in seconds on a CPU.

        found = cachekit.estimate("sdxl", "tgate:m=10", num_inference_steps=25)
        print(found.mac_reduction, found.cache_bytes)

    `model` is a pipeline, a denoiser, the name of a published model (sd15, sd21, sdxl, lcm-sdxl, pixart-alpha,
    pixart-sigma, lcm-pixart, dit-xl (XL/2, 512), sd3 (3.5 medium), flux (dev), qwen-image, wan (2.1, 1.3B),
    hunyuan-video, cogvideox (5b)), a folder, a hub id, or the name of an embedded model (demo, demo-dit, demo-flow,
    demo-lcm). `specs` are as for `apply`. `num_inference_steps` is that of the pipeline's call, whose scheduler gives
    the number of iterations: with Heun, 6 steps are 11. Without a scheduler, it is the number of iterations.
    `height` and `width` are in pixels and default to the model's own size; a bare denoiser is taken to have an
    autoencoder with 8 pixels per latent. For denoisers of other classes, give the arguments of one forward over all
    branches as `inputs`, in place of a size. `guided` is whether the run has two branches; by default a published model
    runs as published, and all else is guided unless the guidance scale is an input of the denoiser.

    Actions that only a real run could decide are counted as computed. Raises a `CachekitError` for an unknown name, a
    bad spec, a size that is no multiple of a latent's, or a denoiser that doesn't run on the meta device.
    """
    estimator = Estimator.of(model, (height, width), inputs=inputs, guided=guided, catalog=catalog)
    return estimator(specs, num_inference_steps)


class Estimator:
    """Estimates runs of one model with one policy or another; its uncached forward is counted once.

    `arguments` are those of one forward over all branches, on the meta device as the denoiser is. The scheduler of
    `pipe`, where it has one, gives the number of iterations and their times. Threads that share an estimator wait for
    each other.
    """

    def __init__(
        self, denoiser: nn.Module, arguments: dict[str, Any], guided: bool, catalog: Catalog, pipe: Any = None
    ) -> None:
        """Estimate runs of `denoiser`."""
        self._denoiser = denoiser
        self._pipe = pipe
        self._arguments = arguments
        self._guided = guided
        self._catalog = catalog
        self._setup = Setup.of({"": denoiser}, (), catalog)
        self._known = Known()
        self._estimating = threading.Lock()

    @classmethod
    def of(
        cls,
        model: Any,
        size: tuple[int | None, int | None] = (None, None),
        *,
        inputs: dict[str, Any] | None = None,
        guided: bool | None = None,
        catalog: Catalog | None = None,
    ) -> Estimator:
        """Prepare estimates of a model; the arguments are those of `estimate`, `size` is height and width."""
        catalog = catalog or installed()
        is_named = isinstance(model, str) and is_architecture(model)
        pipe = pipeline_from_config(model) if isinstance(model, str) and not is_named else model
        guided = guided_by_default(pipe) if guided is None else guided
        branches = 2 if guided else 1
        if is_named:
            known = architecture(model)
            return cls(known.build(), known.inputs(branches, *size), guided, catalog)
        return cls(*_prepare(pipe, (branches, *size), inputs), guided, catalog, pipe)

    def __call__(self, specs: Spec | Iterable[Spec], num_inference_steps: int) -> Estimate:
        """Estimate one run; raises a `CachekitError` as `estimate` does."""
        setup = self._setup.following(parse_all(specs, self._catalog))
        iterations, times = planned_times(self._pipe, num_inference_steps)
        plan = setup.plan_of(iterations, self._guided, times)
        layout = setup.layout if self._guided else setup.layout.alone
        record = _as_planned(plan, layout, self._arguments)
        with self._estimating:
            return _measure(setup, plan, record, self._uncached, self._known)

    @cached_property
    def _uncached(self) -> Forward:
        return count_forward(self._denoiser, (), self._arguments, self._known)


def _prepare(
    pipe: Any, size: tuple[int, int | None, int | None], inputs: dict[str, Any] | None
) -> tuple[nn.Module, dict[str, Any]]:
    denoiser = meta_copy(denoiser_of(pipe))
    if inputs is not None:
        return denoiser, {name: tree_map(on_meta, value) for name, value in inputs.items()}
    known = architecture_of(denoiser, pixels_per_latent(pipe, PIXELS_PER_LATENT))
    return denoiser, known.inputs(*size, dtype=dtype_of(denoiser))


def _as_planned(plan: Plan, layout: Layout, arguments: dict[str, Any]) -> Record:
    """Record a run of `plan`, one call per step, that keeps whatever it may."""
    rows = [row.decided for row in plan.rows]
    whole = [index for index, bound in enumerate(plan.assignments) if bound.is_whole]
    calls = [
        CallRecord("", "", len(layout.order), row, left_out=any(row.actions[i] is Action.REUSE for i in whole))
        for row in rows
    ]
    inputs = {calls[0].inputs: ((), arguments)}
    return Record(len(rows), layout, exact=True, rows=rows, calls=calls, inputs=inputs, times=plan.times)


def _measure(setup: Setup, plan: Plan, record: Record, full: Forward, known: Known) -> Estimate:
    denoiser = setup.denoisers[""].module
    forwards, peak = replay(setup, record, dict.fromkeys(record.inputs, full), known)
    steps = tuple(
        StepCost(row.step, len(row.branches), forward.macs, forward.attention_macs)
        for row, forward in zip(record.rows, forwards)
    )
    final = forwards[_final_phase(record.rows) :]
    idle = full.ran - frozenset().union(*(forward.ran for forward in final))
    params = sum(parameter.numel() for parameter in denoiser.parameters())
    return Estimate(
        macs=sum(step.macs for step in steps),
        baseline_macs=full.macs * len(steps),
        attention_macs=sum(step.attention_macs for step in steps),
        baseline_attention_macs=full.attention_macs * len(steps),
        params=params - _own_parameters(denoiser, idle),
        baseline_params=params,
        cache_bytes=peak,
        steps=steps,
        plan=plan,
    )


def _final_phase(rows: list[Row]) -> int:
    """Find the last step whose branches and actions differ from those of all steps before it."""
    seen = set()
    last = 0
    for place, row in enumerate(rows):
        if row.signature not in seen:
            seen.add(row.signature)
            last = place
    return last


def _own_parameters(model: nn.Module, names: frozenset[str]) -> int:
    """Count the parameters that belong to these modules themselves."""
    modules = dict(model.named_modules())
    return sum(parameter.numel() for name in names for parameter in modules[name].parameters(recurse=False))
