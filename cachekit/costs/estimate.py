"""Estimate what a set of policies would cost on a model, before anything runs and without weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from cachekit.attaching.attachment import Attachment
from cachekit.costs.counting import count_forward
from cachekit.costs.meta import meta_copy, on_meta
from cachekit.costs.replay import replay
from cachekit.driving.setup import Setup
from cachekit.interface.policy import Action
from cachekit.interface.specs import Spec, parse_all
from cachekit.models.architectures import PIXELS_PER_LATENT, architecture, architecture_of
from cachekit.planning.plan import Plan
from cachekit.planning.row import Row
from cachekit.registry.catalog import Catalog, installed
from cachekit.reports.record import CallRecord
from cachekit.tensors import tree_map
from cachekit.upstream.pipelines import denoiser_of


@dataclass(frozen=True)
class StepCost:
    """Hold one step: branches that run, and multiply-accumulates over them."""

    step: int
    branches: int
    macs: int
    attention_macs: int


@dataclass(frozen=True)
class Estimate:
    """Hold what a run would cost, per image; Linear and convolution layers alone are in `macs`.

    `attention_macs` are the products QK and AV beside them. `params` still run in the final phase, that is from
    the last step on which something new happens. `cache_bytes` is the peak of what is kept.
    """

    macs: int
    baseline_macs: int
    attention_macs: int
    baseline_attention_macs: int
    params: int
    baseline_params: int
    cache_bytes: int
    steps: tuple[StepCost, ...]
    plan: Plan

    @property
    def speedup(self) -> float:
        """Return how many times fewer multiply-accumulates there are than uncached."""
        return self.baseline_macs / self.macs


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
    """Return the cost of a run by the real engine over the true denoiser on the meta device.

    `model` is a name (sd15, sd21, sdxl, lcm-sdxl, pixart-alpha, pixart-sigma, lcm-pixart), a pipeline or a
    denoiser; for the latter two `inputs` may give the arguments of one forward over all branches. `height` and
    `width` are in pixels and default to the model's own; a pipeline says how many pixels a latent is, a name's are
    known, and for a bare denoiser it is 8. Cells that a run would decide count as computed.
    """
    catalog = catalog or installed()
    if guided is None:
        guided = architecture(model).guided if isinstance(model, str) else True
    denoiser, arguments = _prepare(model, (2 if guided else 1, height, width), inputs)
    policies = parse_all(specs, catalog.policies)
    with Attachment(Setup.of({"": denoiser}, policies, catalog)) as attachment:
        return _measure(attachment, denoiser, attachment.plan(num_inference_steps, guided=guided), arguments, guided)


def _prepare(
    model: Any, size: tuple[int, int | None, int | None], inputs: dict[str, Any] | None
) -> tuple[nn.Module, dict[str, Any]]:
    if isinstance(model, str):
        known = architecture(model)
        return known.build(), known.inputs(*size)
    denoiser = meta_copy(denoiser_of(model))
    if inputs is not None:
        return denoiser, {name: tree_map(on_meta, value) for name, value in inputs.items()}
    known = architecture_of(denoiser, getattr(model, "vae_scale_factor", PIXELS_PER_LATENT))
    return denoiser, known.inputs(*size, dtype=next(denoiser.parameters()).dtype)


def _measure(
    attachment: Attachment, denoiser: nn.Module, plan: Plan, arguments: dict[str, Any], guided: bool
) -> Estimate:
    full = count_forward(denoiser, (), arguments)
    rows = [_decided(row) for row in plan.rows]
    calls = [CallRecord("", "", 2 if guided else 1, row) for row in rows]
    attachment.install(denoiser)
    layout = attachment.setup.layout if guided else attachment.setup.layout.alone
    inputs = {calls[0].inputs: ((), arguments)}
    forwards, peak = replay(attachment, calls, inputs, {calls[0].inputs: full}, layout, len(rows))
    steps = tuple(
        StepCost(row.step, len(row.branches), forward.macs, forward.attention_macs)
        for row, forward in zip(rows, forwards)
    )
    final = forwards[_final_phase(rows) :]
    idle = full.ran - frozenset().union(*(forward.ran for forward in final))
    weights = sum(parameter.numel() for parameter in denoiser.parameters())
    return Estimate(
        macs=sum(step.macs for step in steps),
        baseline_macs=full.macs * len(calls),
        attention_macs=sum(step.attention_macs for step in steps),
        baseline_attention_macs=full.attention_macs * len(calls),
        params=weights - _own_parameters(denoiser, idle),
        baseline_params=weights,
        cache_bytes=peak,
        steps=steps,
        plan=plan,
    )


def _decided(row: Row) -> Row:
    return replace(row, actions=[Action.STORE if action is None else action for action in row.actions])


def _final_phase(rows: list[Row]) -> int:
    """Return the last step whose branches and actions were not seen before."""
    seen = set()
    last = 0
    for place, row in enumerate(rows):
        if row.signature not in seen:
            seen.add(row.signature)
            last = place
    return last


def _own_parameters(model: nn.Module, names: frozenset[str]) -> int:
    modules = dict(model.named_modules())
    return sum(parameter.numel() for name in names for parameter in modules[name].parameters(recurse=False))
