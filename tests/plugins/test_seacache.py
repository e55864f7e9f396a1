"""SeaCache decides as diffusers' hook does for the same samples, and equals a loop written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SeaCacheConfig
from diffusers.hooks import sea_cache
from support import tiny
from support.comparisons import ROUNDING, compared

import cachekit
from cachekit import DENOISER, Linear, Moment, PolicyError, Reuse, Signal, SiteError, Time
from cachekit.testing import Outcome, check_policy

STEPS = 10


def config(**changes: Any) -> SeaCacheConfig:
    names = {"order": "residual_order", "first": "retention_steps", "final": "cache_end_steps"}
    names |= {"longest": "max_consecutive_cached", "power": "power_exp"}
    return SeaCacheConfig(**{names.get(name, name): value for name, value in changes.items()})


class Theirs:
    """diffusers' gate, which is shown the samples of a run one by one."""

    def __init__(self, **options: Any) -> None:
        self.config = config(**options)
        self.state, self.shared = sea_cache.SeaCacheContextState(), sea_cache.SeaCacheSharedState()

    def is_full(self, sample: torch.Tensor, step: int, sigma: float, steps: int) -> bool:
        videos = sample if sample.dim() > 4 else sample.unsqueeze(2)
        shown = sea_cache._SeaCacheForwardMetadata(step, sigma, steps, list(videos))
        indicator = sea_cache._build_indicator(self.config, shown)
        full = self.shared.resolve_gate(self.state, shown, indicator, self.config)
        self.state.consecutive_cached = 0 if full else self.state.consecutive_cached + 1
        return full


class Ours:
    """The indicator of the policy, without a run."""

    def __init__(self, **options: Any) -> None:
        (choice,) = cachekit.policies()["seacache"](**options).choices().values()
        self.when, self.memory = choice.when, {}

    def is_full(self, sample: torch.Tensor, step: int, sigma: float, steps: int) -> bool:
        time = Time(step, sigma=sigma, alpha=1 - sigma, kind="flow")
        at = Moment(step, steps, 0, time, DENOISER, ("cond",), self.memory, {})
        full = self.when.full(at) or self.when.needs(Signal((sample,)), at)
        self.when.took(Signal((sample,)), at, full)
        return full


@compared("seacache", "diffusers: the decisions, on a trace of samples", [], "the same decisions")
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.25, "power": 3.0},
        {"threshold": 0.6, "power": 2.0, "longest": 0},
        {"threshold": 2.0, "power": 3.0, "first": 3, "final": 2, "longest": 4},
    ],
    ids=["default", "any number in a row", "more at both ends"],
)
def test_decisions_are_those_of_diffusers(options: dict[str, Any]) -> None:
    """The samples are those of a flow from noise to a picture, `(batch, channels, frames, height, width)`."""
    random = torch.Generator().manual_seed(0)
    noise, clean = (torch.randn(2, 4, 3, 8, 6, generator=random) for _ in range(2))
    ours, theirs, found = Ours(**options), Theirs(**options), []
    for step in range(24):
        sigma = 1 - step / 24
        sample = sigma * noise + (1 - sigma) * clean.cumsum(-1)
        full = ours.is_full(sample, step, sigma, 24)
        assert full == theirs.is_full(sample, step, sigma, 24)
        found.append(full)
    assert len(set(found)) == 2


class ByHand:
    """The decisions of diffusers' gate in place of a denoiser's forward, with the residual of the whole call."""

    def __init__(self, pipe: Any, order: int, **options: Any) -> None:
        denoiser = tiny.denoiser_of(pipe)
        self.forward, self.scheduler, self.order = denoiser.forward, pipe.scheduler, order
        self.calls, self.count, self.full = 2 if type(pipe).__name__ == "WanPipeline" else 1, 0, []
        self.gate, self.kept = Theirs(order=order, **options), {}
        denoiser.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sample = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        step, branch = divmod(self.count, self.calls)
        self.count += 1
        if branch == 0:
            sigma = float(self.scheduler.sigmas[step])
            self.full.append(self.gate.is_full(sample, step, sigma, STEPS))
        kept = self.kept.setdefault(branch, [])
        if self.full[-1]:
            output = self.forward(*args, **kwargs)
            kept.insert(0, (step, output[0] - sample))
            return output
        (newest, residual), *older = kept
        if self.order and older:
            before, other = older[0]
            share = (step - newest) / (newest - before)
            residual = residual * (1 + share) - other * share
        return (residual + sample,)


@compared("seacache", "a replay", "name", ROUNDING)
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_equal_to_the_loop_by_hand(name: str, order: int) -> None:
    make, power = {"wan": (tiny.wan, 3.0), "sd3": (tiny.sd3, 2.0)}[name]
    pipe, twin = make(), make()
    hand = ByHand(twin, order, threshold=0.4, power=power)
    expected = tiny.latents(twin, steps=STEPS)
    plain = tiny.latents(pipe, steps=STEPS)
    spec = f"seacache:order={order},threshold=0.4"
    with cachekit.apply(pipe, spec) as attachment:
        cached = tiny.latents(pipe, steps=STEPS)
        assert attachment.report().left_out == hand.full.count(False) * hand.calls > 0
    torch.testing.assert_close(cached, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(tiny.latents(pipe, steps=STEPS), plain)
    assert not torch.equal(cached, plain)
    with cachekit.apply(pipe, spec):
        assert torch.equal(tiny.latents(pipe, steps=STEPS), cached)


@compared("seacache", "diffusers, in the steps that it computes", ["wan"], ROUNDING)
def test_equal_to_the_hook_of_diffusers_in_the_steps_that_it_computes() -> None:
    """Its gate is shown other latents than the sample, so its steps are taken over, and its residuals compared."""
    pipe, twin = tiny.wan(), tiny.wan()
    calls: list[int] = []
    computed: list[int] = []
    twin.transformer.register_forward_pre_hook(lambda *_: calls.append(len(calls)))
    twin.transformer.blocks[-1].attn1.register_forward_hook(lambda *_: computed.append(calls[-1] // 2))
    twin.transformer.enable_cache(config(threshold=0.4, power=3.0, order=1))
    expected, plain = tiny.latents(twin, steps=STEPS), tiny.latents(pipe, steps=STEPS)
    full = sorted(set(computed))
    assert 2 < len(full) < STEPS - 2
    mask = ";".join(map(str, full))
    with cachekit.apply(pipe, f"cache:where=span(chain=all),when=mask({mask}),what=linear(of=residual)"):
        found = tiny.latents(pipe, steps=STEPS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_a_sample_without_axes_is_refused_before_anything_is_computed() -> None:
    pipe = tiny.flux()
    calls = []
    pipe.transformer.x_embedder.register_forward_hook(lambda *_: calls.append(1))
    with cachekit.apply(pipe, "seacache"), pytest.raises(SiteError) as caught:
        tiny.latents(pipe, steps=STEPS)
    assert str(caught.value) == "seacache: the sample (1, 16, 16) has no axes of space; use easycache"
    assert not calls
    (result,) = check_policy("seacache", models=["flux"], checks=["check_runs"])
    assert (result.outcome, result.note) == (Outcome.REFUSED, str(caught.value))


def test_a_scheduler_without_a_share_of_noise_is_refused_when_the_run_begins() -> None:
    when = cachekit.policies()["seacache"]().choices()["denoiser"].when
    run = cachekit.Beginning(None, None, {}, 2, (Time(0, 9.0),) * 2, cachekit.Layout(), "", (), (1, 4, 8, 8))
    with pytest.raises(PolicyError, match="seacache: the scheduler gives no noise level to filter by; use easy"):
        when.begin(run, {})


def test_the_order_chooses_the_stand_in() -> None:
    seacache = cachekit.policies()["seacache"]
    for order, kind in ((0, Reuse), (1, Linear)):
        (choice,) = seacache(order=order).choices().values()
        assert (type(choice.what), choice.what.of) == (kind, "residual")
