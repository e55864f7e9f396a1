"""Forecasts equal a loop written by hand, on every family of denoisers; calls that are left out leave no trace."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from support import tiny

import cachekit

STEPS = 9
PIPES = {"sd": tiny.sd, "sdxl": tiny.sdxl, "pixart": tiny.pixart, "sd3": tiny.sd3, "flux": tiny.flux, "wan": tiny.wan}


class ByHand:
    """A linear forecast of the output, in place of the denoiser's forward; each call of a step has its own history."""

    def __init__(self, denoiser: torch.nn.Module, interval: int, calls: int) -> None:
        self.forward, self.interval, self.calls, self.count = denoiser.forward, interval, calls, 0
        self.kept: dict[int, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        denoiser.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step, which = divmod(self.count, self.calls)
        self.count += 1
        if step % self.interval == 0 or step == STEPS - 1:
            output = self.forward(*args, **kwargs)
            self.kept[which].append((step, output[0]))
            return output
        (a, newest), kept = self.kept[which][-1], self.kept[which]
        if len(kept) < 2:
            return (newest,)
        b, older = kept[-2]
        return (newest + (step - a) / (a - b) * (newest - older),)


@pytest.mark.parametrize("interval", [2, 3, 4])
@pytest.mark.parametrize("name", PIPES)
def test_a_forecast_equals_a_loop_by_hand(name: str, interval: int) -> None:
    pipe, twin = PIPES[name](), PIPES[name]()
    calls = 2 if name == "wan" else 1
    hand = ByHand(tiny.denoiser_of(twin), interval, calls)
    wanted = tiny.latents(twin, steps=STEPS)
    assert hand.count == STEPS * calls
    uncached = tiny.latents(pipe, steps=STEPS)
    with cachekit.apply(pipe, f"forecast:interval={interval}") as attachment:
        cached = tiny.latents(pipe, steps=STEPS)
        report = attachment.report()
        plan = attachment.plan(STEPS)
    torch.testing.assert_close(cached, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(cached, uncached)
    full = [step for step in range(STEPS) if step % interval == 0 or step == STEPS - 1]
    assert report.calls == len(full) * calls
    assert report.left_out == (STEPS - len(full)) * calls
    assert [step for step, row in enumerate(plan.rows) if row.actions[0] is not cachekit.Action.REUSE] == full
    assert torch.equal(tiny.latents(pipe, steps=STEPS), uncached)
    with cachekit.apply(pipe, f"forecast:interval={interval}"):
        assert torch.equal(tiny.latents(pipe, steps=STEPS), cached)
