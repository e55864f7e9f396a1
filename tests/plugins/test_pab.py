"""PAB equals diffusers' own to the bit, wherever both run; where diffusers mixes branches, a replay by hand."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig, UNet2DModel
from diffusers.hooks import apply_pyramid_attention_broadcast
from support import tiny
from support.comparisons import compared

import cachekit
from cachekit import SiteError, SpecError

STEPS = 8
MAKERS = {"flux": tiny.flux, "sd3": tiny.sd3, "pixart": tiny.pixart, "wan": tiny.wan, "sd": tiny.sd, "svd": tiny.svd}


@functools.cache
def shared(name: str) -> Any:
    """The pipeline that cached and plain runs share, because whatever is applied to it is undone."""
    return MAKERS[name]()


@functools.cache
def plain(name: str, guidance: float) -> torch.Tensor:
    return tiny.latents(shared(name), steps=STEPS, guidance=guidance)


def timestep_of(pipe: Any) -> Callable[[], float]:
    """Follow the scheduler's timestep over a run with one call in each step; not all pipelines show theirs."""
    calls = itertools.count()
    now = {"step": -1}
    tiny.denoiser_of(pipe).register_forward_pre_hook(lambda *_: now.update(step=next(calls)))
    return lambda: float(pipe.scheduler.timesteps[now["step"]])


def published(name: str, guidance: float, low: float, high: float, **intervals: int) -> torch.Tensor:
    """Run with diffusers' own broadcast, on a pipeline of its own; `intervals` are by kind."""
    pipe = MAKERS[name]()
    ranges = {f"{kind}_attention_block_skip_range": interval for kind, interval in intervals.items()}
    windows = {f"{kind}_attention_timestep_skip_range": (low, high) for kind in intervals}
    config = PyramidAttentionBroadcastConfig(**ranges, **windows, current_timestep_callback=timestep_of(pipe))
    apply_pyramid_attention_broadcast(tiny.denoiser_of(pipe), config)
    return tiny.latents(pipe, steps=STEPS, guidance=guidance)


CASES = {
    "pab:cross=1": ("flux", 1.0, 100, 800, {"spatial": 2}),
    "pab:cross=1,low=0,spatial=3": ("flux", 1.0, 0, 800, {"spatial": 3}),
    "pab:cross=1,high=10000,low=-1,spatial=3": ("sd3", 5.0, -1, 10000, {"spatial": 3}),
    "pab:cross=1,high=900": ("sd3", 5.0, 100, 900, {"spatial": 2}),
    "pab": ("pixart", 5.0, 100, 800, {"spatial": 2, "cross": 6}),
    "pab:spatial=3,cross=2,low=200,high=700": ("pixart", 5.0, 200, 700, {"spatial": 3, "cross": 2}),
    "pab:cross=4,spatial=1,high=2000": ("pixart", 1.0, 100, 2000, {"cross": 4}),
    "pab:cross=3,low=300,high=950": ("wan", 1.0, 300, 950, {"spatial": 2, "cross": 3}),
}


@compared("pab", "diffusers", ["flux", "sd3", "pixart", "wan"])
@pytest.mark.parametrize(("spec", "case"), CASES.items(), ids=CASES)
def test_latents_are_those_of_diffusers(spec: str, case: tuple[Any, ...]) -> None:
    name, guidance, low, high, intervals = case
    pipe, uncached = shared(name), plain(name, guidance)
    wanted = published(name, guidance, low, high, **intervals)
    for _ in range(2):
        with cachekit.apply(pipe, spec) as attachment:
            assert torch.equal(tiny.latents(pipe, steps=STEPS, guidance=guidance), wanted)
            report, times = attachment.report(), pipe.scheduler.timesteps.tolist()
        assert torch.equal(tiny.latents(pipe, steps=STEPS, guidance=guidance), uncached)
    assert not torch.equal(wanted, uncached)
    for count in report.counts:
        interval = intervals.get(
            {"joint_attention": "spatial", "cross_attention": "cross"}.get(count.kind, "spatial"), 1
        )
        reused = sum(1 for step, time in enumerate(times) if step % interval and low < time < high)
        assert (count.reused, count.missed) == (count.targets * reused, 0)
    assert any(count.reused for count in report.counts)
    assert report.macs < report.baseline_macs


class ByHand:
    """Every module runs; inside the window what it returns is replaced by what its branch's last full step returned."""

    def __init__(self, pipe: Any, intervals: dict[str, int], low: float, high: float, calls: int) -> None:
        self.call, self.calls = -1, calls
        times = pipe.scheduler
        denoiser = tiny.denoiser_of(pipe)
        denoiser.register_forward_pre_hook(self.begin)
        for name, module in denoiser.named_modules():
            for suffix, interval in intervals.items():
                if name.endswith(suffix):
                    module.register_forward_hook(functools.partial(self.leave, interval, low, high, times, {}))

    def begin(self, *_: Any) -> None:
        self.call += 1

    def leave(self, interval: int, low: float, high: float, scheduler: Any, kept: dict[int, Any], *called: Any) -> Any:
        step, branch = divmod(self.call, self.calls)
        if step % interval and low < float(scheduler.timesteps[step]) < high:
            return kept[branch]
        kept[branch] = called[-1]
        return None


REPLAYED = {
    "wan": ("pab:cross=3", {"attn1": 2, "attn2": 3}, 2),
    "sd": ("pab:spatial=3,cross=2", {"attn1": 3, "attn2": 2}, 1),
    "svd": ("pab:temporal=3,low=-5,high=5", {"temporal_transformer_blocks.0.attn1": 3}, 1),
}


@compared("pab", "a replay", "name")
@pytest.mark.parametrize("name", REPLAYED)
def test_latents_are_those_of_a_replay(name: str) -> None:
    spec, intervals, calls = REPLAYED[name]
    bounds = (-5, 5) if name == "svd" else (100, 800)
    if name == "svd":  # the other kinds are found by names that overlap
        spec += ",spatial=1,cross=1"
    twin = MAKERS[name]()
    ByHand(twin, intervals, *bounds, calls)
    wanted = tiny.latents(twin, steps=STEPS)
    with cachekit.apply(shared(name), spec):
        assert torch.equal(tiny.latents(shared(name), steps=STEPS), wanted)
    assert not torch.equal(wanted, plain(name, 5.0))


def test_diffusers_gives_one_branch_the_attention_of_the_other() -> None:
    """With a call for each branch its counter is odd in all unconditional calls, so these never compute attention."""
    pipe = tiny.wan()
    ran: list[int] = []
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 10000),
        current_timestep_callback=lambda: 500,
    )
    calls, now = itertools.count(), {"call": -1}
    pipe.transformer.register_forward_pre_hook(lambda *_: now.update(call=next(calls)))
    pipe.transformer.blocks[0].attn1.to_q.register_forward_hook(lambda *_: ran.append(now["call"]))
    apply_pyramid_attention_broadcast(pipe.transformer, config)
    theirs = tiny.latents(pipe, steps=STEPS)
    assert ran == list(range(0, 2 * STEPS, 2))
    with cachekit.apply(shared("wan"), "pab:cross=1,low=-1,high=10000"):
        assert not torch.equal(tiny.latents(shared("wan"), steps=STEPS), theirs)


def test_kinds_that_a_model_lacks_are_left_out() -> None:
    with cachekit.apply(shared("flux"), "pab") as attachment:
        kinds = {bound.target.kind.value for bound in attachment.plan(STEPS).assignments}
    assert kinds == {"self_attention", "joint_attention"}
    with cachekit.apply(shared("svd"), "pab") as attachment:
        kinds = {bound.target.kind.value for bound in attachment.plan(STEPS).assignments}
    assert kinds == {"self_attention", "temporal_attention", "cross_attention"}


def test_what_is_refused() -> None:
    with pytest.raises(SpecError, match=r"pab:low=800,high=100': low must be below high; give the window as timesteps"):
        cachekit.apply(shared("flux"), "pab:low=800,high=100")
    widths = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = UNet2DModel(sample_size=8, add_attention=False, **widths, **blocks)
    with pytest.raises(SiteError, match=r"pab: found nothing to act on, but UNet2DModel has .*; use another policy"):
        cachekit.apply(model, "pab")
