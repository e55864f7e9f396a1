"""FORA equals a replay by hand to the bit, in which every layer runs and what it returns is replaced."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support import tiny
from support.comparisons import compared

import cachekit
from cachekit import Action

STEPS = 7
#: For each pipeline: the ends of the names of its layers, and how many calls make a step.
LAYERS = {
    "pixart": (tiny.pixart, ("attn1", "attn2", "ff"), 1),
    "sd3": (tiny.sd3, ("attn", "ff", "ff_context"), 1),
    "flux": (tiny.flux, ("attn", "ff", "ff_context", "proj_mlp"), 1),
    "wan": (tiny.wan, ("attn1", "attn2", "ffn"), 2),
    "sd": (tiny.small, ("attn1", "attn2", "ff"), 1),
}


class ByHand:
    """Every layer runs; except in every `interval`-th step it returns what it returned in the last of those."""

    def __init__(self, denoiser: torch.nn.Module, ends: tuple[str, ...], calls: int, interval: int) -> None:
        self.call, self.calls, self.interval, self.layers = -1, calls, interval, 0
        denoiser.register_forward_pre_hook(self.begin)
        for name, module in denoiser.named_modules():
            if name.rpartition(".")[2] in ends:
                self.layers += 1
                module.register_forward_hook(functools.partial(self.leave, {}))

    def begin(self, *_: Any) -> None:
        self.call += 1

    def leave(self, kept: dict[int, Any], *called: Any) -> Any:
        step, branch = divmod(self.call, self.calls)
        if step % self.interval == 0:
            kept[branch] = called[-1]
        return kept[branch]


@compared("fora", "a replay", "name")
@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_latents_are_those_of_a_replay(name: str, interval: int) -> None:
    make, ends, calls = LAYERS[name]
    pipe, twin = make(), make()
    hand = ByHand(tiny.denoiser_of(twin), ends, calls, interval)
    wanted, uncached = tiny.latents(twin, steps=STEPS), tiny.latents(pipe, steps=STEPS)
    assert not torch.equal(wanted, uncached)
    for _ in range(2):
        with cachekit.apply(pipe, f"fora:interval={interval}") as attachment:
            assert torch.equal(tiny.latents(pipe, steps=STEPS), wanted)
            report, plan = attachment.report(), attachment.plan(STEPS)
        assert torch.equal(tiny.latents(pipe, steps=STEPS), uncached)
    assert sum(count.targets for count in report.counts) == hand.layers
    planned = sum(row.actions.count(Action.REUSE) for row in plan.rows)
    assert sum(count.reused for count in report.counts) == calls * planned > 0
    assert sum(count.missed for count in report.counts) == 0
    assert report.macs < report.baseline_macs


def test_an_interval_of_one_changes_nothing() -> None:
    pipe = tiny.pixart()
    uncached = tiny.latents(pipe, steps=STEPS)
    with cachekit.apply(pipe, "fora:interval=1") as attachment:
        assert torch.equal(tiny.latents(pipe, steps=STEPS), uncached)
        assert attachment.report().cache_bytes == 0


def test_a_part_can_be_replaced() -> None:
    pipe = tiny.pixart()
    with cachekit.apply(pipe, "fora:what=taylor(1)") as attachment:
        extrapolated, report = tiny.latents(pipe, steps=STEPS), attachment.report()
    with cachekit.apply(pipe, "fora"):
        assert not torch.equal(tiny.latents(pipe, steps=STEPS), extrapolated)
    assert sum(count.reused for count in report.counts) > 0
