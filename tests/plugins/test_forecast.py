"""Forecasts equal a loop written by hand, on every family of denoisers; calls that are left out leave no trace."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from support import tiny
from support.comparisons import ROUNDING, compared

import cachekit

STEPS = 9
PIPES = {"sd": tiny.sd, "sdxl": tiny.sdxl, "pixart": tiny.pixart, "sd3": tiny.sd3, "flux": tiny.flux, "wan": tiny.wan}
EMBEDDED = {"demo": "unet", "demo-dit": "dit"}
#: Few steps, but enough for a line through two full ones.
EMBEDDED_STEPS = {("demo", 2): 5, ("demo-dit", 3): 7}
CASES = [*product(PIPES, (2, 3, 4)), *EMBEDDED_STEPS]


def built(name: str) -> Any:
    return cachekit.demo_pipeline(EMBEDDED[name]) if name in EMBEDDED else PIPES[name]()


def latents(pipe: Any, name: str, steps: int) -> torch.Tensor:
    if name not in EMBEDDED:
        return tiny.latents(pipe, steps=steps)
    given = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    return pipe("a large red circle top left on white", num_inference_steps=steps, guidance_scale=3.5, **given).images


class ByHand:
    """A linear forecast of the output, in place of the denoiser's forward; each call of a step has its own history.

    `axis` has each step's place on the line; where one of three is infinite, their steps are taken.
    """

    def __init__(
        self, denoiser: torch.nn.Module, interval: int, calls: int, steps: int, axis: Sequence[float] = range(STEPS)
    ) -> None:
        self.axis = axis
        self.forward, self.interval, self.calls, self.steps = denoiser.forward, interval, calls, steps
        self.count = self.lines = 0
        self.kept: dict[int, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        denoiser.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step, which = divmod(self.count, self.calls)
        self.count += 1
        if step % self.interval == 0 or step == self.steps - 1:
            output = self.forward(*args, **kwargs)
            self.kept[which].append((step, output[0]))
            return output
        (a, newest), kept = self.kept[which][-1], self.kept[which]
        if len(kept) < 2:
            return (newest,)
        b, older = kept[-2]
        self.lines += 1
        here, last, before = (self.axis[place] for place in (step, a, b))
        if math.inf in map(abs, (here, last, before)):
            here, last, before = step, a, b
        return (newest + (here - last) / (last - before) * (newest - older),)


@compared("forecast", "a replay", PIPES, ROUNDING)
@pytest.mark.parametrize(("name", "interval"), CASES)
def test_a_forecast_equals_a_loop_by_hand(name: str, interval: int) -> None:
    pipe, twin, steps = built(name), built(name), EMBEDDED_STEPS.get((name, interval), STEPS)
    calls = 2 if name == "wan" else 1
    hand = ByHand(tiny.denoiser_of(twin), interval, calls, steps)
    wanted = latents(twin, name, steps)
    assert hand.count == steps * calls
    assert hand.lines == calls * sum(step % interval > 0 for step in range(interval + 1, steps - 1)) > 0
    uncached = latents(pipe, name, steps)
    with cachekit.apply(pipe, f"forecast:interval={interval}") as attachment:
        cached = latents(pipe, name, steps)
        report = attachment.report()
        plan = attachment.plan(steps)
    torch.testing.assert_close(cached, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(cached, uncached)
    full = [step for step in range(steps) if step % interval == 0 or step == steps - 1]
    assert report.calls == len(full) * calls
    assert report.left_out == (steps - len(full)) * calls
    assert [step for step, row in enumerate(plan.rows) if row.actions[0] is not cachekit.Action.REUSE] == full
    assert torch.equal(latents(pipe, name, steps), uncached)
    with cachekit.apply(pipe, f"forecast:interval={interval}"):
        assert torch.equal(latents(pipe, name, steps), cached)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_line_along_log_snr_of_a_flow_equals_a_loop_by_hand(name: str) -> None:
    """The first step is pure noise: what would use its value is forecast along the steps."""
    pipe = built(name)
    latents(pipe, name, STEPS)
    sigmas = pipe.scheduler.sigmas[:STEPS].double()
    axis = torch.log((1 - sigmas) / sigmas).tolist()
    assert axis[0] == -math.inf
    assert all(map(math.isfinite, axis[1:]))
    wanted = {}
    for label, places in (("step", range(STEPS)), ("log_snr", axis)):
        twin = built(name)
        ByHand(tiny.denoiser_of(twin), 2, 1, STEPS, places)
        wanted[label] = latents(twin, name, STEPS)
    with cachekit.apply(pipe, "cache:where=denoiser,when=every(2,last=true),what=linear(axis=log_snr)"):
        cached = latents(pipe, name, STEPS)
    torch.testing.assert_close(cached, wanted["log_snr"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(cached, wanted["step"], rtol=1e-3, atol=1e-4)
